"""Streamed perplexity against the model's own logits."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from secateur.pruning.checkpoint import DTYPES
from secateur.pruning.discovery import family_of
from secateur.pruning.evaluation import measure
from secateur.pruning.memory import MOST_TOKENS
from secateur.pruning.streaming import StreamedModel
from tests.engine.conftest import MakeModel
from tests.engine.runs import checkpoint

WINDOWS = torch.randint(0, 256, (5, 48), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("differing", [True, False])
def test_a_head_beside_a_config_that_ties_counts_as_loaded(make_model: MakeModel, tmp_path: Path, differing: bool) -> None:
    """The checkpoint decides: its own head is used if it differs, whatever the config says of tying."""
    shutil.copytree(make_model(tied=True), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.flip(0).clone() if differing else embedding.clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(whole.lm_head.weight, whole.model.embed_tokens.weight) is not differing
    with checkpoint(tmp_path) as source, torch.no_grad():
        expected = math.exp(float(whole(WINDOWS, labels=WINDOWS).loss))
        streamed = StreamedModel(source, family_of(source.headers), DTYPES["float32"], torch.device("cpu"))
        assert measure(streamed, WINDOWS, lambda _: None).perplexity == pytest.approx(expected, rel=1e-5)


def test_perplexity_is_that_of_the_models_own_loss(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MOST_TOKENS, "cpu", 96)  # two windows at a time, and one left
    monkeypatch.setattr("secateur.pruning.evaluation.LOGITS_AT_ONCE", 257 * 10)
    whole = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    blocks: list[int] = []
    with checkpoint(llama) as source, torch.no_grad():
        expected = math.exp(float(whole(WINDOWS, labels=WINDOWS).loss))
        streamed = StreamedModel(source, family_of(source.headers), DTYPES["float32"], torch.device("cpu"))
        assert measure(streamed, WINDOWS, blocks.append).perplexity == pytest.approx(expected, rel=1e-5)
    assert blocks == [1, 2, 3]
