"""The demo model, which is a real one, through the real service: the short form of `make demo`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from scripts import demo_model
from secateur.schemas.jobs import Job
from tests.service.conftest import up

# Two to eleven minutes: processors without bfloat16 instructions take six times as long.
pytestmark = [pytest.mark.real_model, pytest.mark.timeout(1800)]


def body(method: str, **sparsity: float | str) -> dict[str, object]:
    return {
        "kind": "prune",
        "model": {"source": "local", "id": demo_model.NAME},
        "method": {"name": method},
        "sparsity": sparsity,
        "calibration": {"samples": 32, "sequence_length": 512},
        "evaluation": {"perplexity": {"sequence_length": 1024, "max_windows": 8}},
    }


def perplexities(job: Job) -> tuple[float, float]:
    assert job.status == "succeeded", job.error
    assert job.metrics is not None
    assert job.metrics.perplexity is not None
    assert job.metrics.perplexity.dense is not None
    assert job.metrics.perplexity.pruned is not None
    return job.metrics.perplexity.dense, job.metrics.perplexity.pruned


def test_a_real_model_is_pruned_well_and_loads(tmp_path: Path) -> None:
    models = demo_model.ensure().parent
    with up(tmp_path / "state", models) as service:
        jobs = [service.client.jobs.create(each) for each in (body("wanda", target=0.5), body("sparsegpt", pattern="2:4"))]
        jobs.append(service.client.jobs.create(body("sparsegpt", target=0.5)))
        wanda, two_of_four, sparsegpt = (service.finish(job.id, seconds=1500) for job in jobs)
        folder = service.client.jobs.download(two_of_four.id, tmp_path / "model")
    dense, wanda_perplexity = perplexities(wanda)
    dense_again, sparsegpt_perplexity = perplexities(sparsegpt)
    assert dense_again == dense
    assert sparsegpt_perplexity < wanda_perplexity < 2.4 * dense
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        weight = file.get_tensor("model.layers.7.self_attn.q_proj.weight")
    assert int((weight.view(len(weight), -1, 4) == 0).sum(dim=-1).min()) >= 2
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
