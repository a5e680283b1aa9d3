"""Whole runs on small models: what comes in, what comes out, and what is told on the way."""

from __future__ import annotations

import errno
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.problems import ProblemError
from secateur.pruning import checkpoint as checkpoints
from secateur.pruning import registry
from secateur.pruning.events import Event
from secateur.pruning.kinds import finishing
from tests.engine.conftest import MakeModel
from tests.engine.runs import prune, recipe

PERPLEXITY: dict[str, Any] = {"evaluation": {"perplexity": {"sequence_length": 64, "max_windows": 4}}}
METHODS = ["magnitude", "wanda", "sparsegpt"]  # one for each thing that is observed: nothing, norms, the Gram


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("method", METHODS)
def test_every_family_comes_out_pruned_and_loads(
    make_model: MakeModel, tmp_path: Path, architecture: str, method: str
) -> None:
    source = make_model(architecture, tied=False)
    result = prune(recipe(method), source, tmp_path)

    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "output" / "model.safetensors")
    assert before.keys() == after.keys()
    linears = {name for name in before if name.endswith("_proj.weight")}
    assert len(linears) == 21
    for name, weight in after.items():
        if name in linears:
            assert int((weight == 0).sum()) == weight.numel() // 2
        else:
            assert torch.equal(weight, before[name])
    assert result.metrics["sparsity"] == 0.5

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "output")("A garden", return_tensors="pt")
    assert bool(model(**tokens).logits.isfinite().all())


@pytest.mark.parametrize("method", registry.METHODS)
def test_n_of_m_leaves_its_zeros_in_every_group(llama: Path, tmp_path: Path, method: str) -> None:
    result = prune(recipe(method, "1:4"), llama, tmp_path)
    for name, weight in load_file(tmp_path / "output" / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            assert int((weight.view(len(weight), -1, 4) == 0).sum(2).min()) == 3
    removed = [linear["removed"] / (linear["shape"][0] * linear["shape"][1]) for linear in linears_of(result.report)]
    assert removed == [0.75] * 21


def linears_of(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [linear for block in report["blocks"] for linear in block["linears"]]


def test_tied_embeddings_stay_tied_and_untouched_and_are_named(llama: Path, tmp_path: Path) -> None:
    report = prune(recipe(), llama, tmp_path).report
    assert report["verification"]["head_tied_to"] == "model.embed_tokens.weight"
    before, after = load_file(llama / "model.safetensors"), load_file(tmp_path / "output" / "model.safetensors")
    assert "lm_head.weight" not in after
    assert torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "output")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_the_output_has_the_dtype_that_was_asked_for(llama: Path, tmp_path: Path) -> None:
    prune(recipe(output={"dtype": "bfloat16"}), llama, tmp_path)
    before, after = load_file(llama / "model.safetensors"), load_file(tmp_path / "output" / "model.safetensors")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert torch.equal(after["model.norm.weight"], before["model.norm.weight"].bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "output").dtype == torch.bfloat16


@pytest.mark.parametrize("method", registry.METHODS)
def test_the_same_job_twice_gives_the_same_bytes(llama: Path, tmp_path: Path, method: str) -> None:
    wanted = recipe(method, output={"dtype": "bfloat16"}, **PERPLEXITY)
    first, second = prune(wanted, llama, tmp_path / "first"), prune(wanted, llama, tmp_path / "second")
    assert first.files == second.files
    assert {file.path for file in first.files} >= {
        "README.md",
        "compression_report.json",
        "config.json",
        "model.safetensors",
    }


def test_another_seed_gives_another_model(llama: Path, tmp_path: Path) -> None:
    calibration = {"samples": 6, "sequence_length": 32, "seed": 1}
    first = prune(recipe(), llama, tmp_path / "first")
    second = prune(recipe(calibration=calibration), llama, tmp_path / "second")
    assert first.report["calibration"]["token_sha256"] != second.report["calibration"]["token_sha256"]
    assert first.files != second.files


def test_shards_in_and_shards_out(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prune(recipe(), llama, tmp_path / "whole")
    sharded = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(llama).save_pretrained(sharded, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(llama).save_pretrained(sharded)
    assert not (sharded / "model.safetensors").exists()
    monkeypatch.setattr(checkpoints, "SINGLE_FILE_BYTES", 10_000)
    result = prune(recipe(), sharded, tmp_path)

    names = {file.path for file in result.files}
    assert {"model.safetensors.index.json", "model-00001-of-00004.safetensors"} <= names
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "output").state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "output").state_dict()
    assert all(torch.equal(pruned[name], expected[name]) for name in expected)
    assert whole.metrics["sparsity"] == result.metrics["sparsity"]


def test_what_a_run_tells(llama: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    result = prune(recipe("sparsegpt", **PERPLEXITY), llama, tmp_path, events)
    json.dumps([events, result.metrics, result.report])
    stages = [event["stage"] for event in events if event["type"] == "stage"]
    assert stages == ["calibrating", "pruning", "evaluating", "packaging"]
    done = [(event["done"], event["total"]) for event in events if event["type"] == "progress"]
    assert done == [(i, 3) for i in range(4)] + [(i, 6) for i in range(1, 7)]  # evaluating: the dense model, then the pruned
    assert result.metrics["perplexity"]["protocol"]["tokens"] == 4 * 63
    assert result.metrics["peak_memory_bytes"] > 10_000_000
    assert set(result.metrics["seconds"]) == {"prune", "evaluate", "total"}
    assert [linear["name"] for linear in result.report["blocks"][0]["linears"]][-1] == "model.layers.0.mlp.down_proj.weight"
    assert {linear["error_measure"] for linear in linears_of(result.report)} == {"gram"}


def test_files_hold_no_time_and_no_place(llama: Path, tmp_path: Path) -> None:
    result = prune(recipe(**PERPLEXITY), llama, tmp_path)
    for file in result.files:
        if file.path.endswith((".json", ".md")):
            text = (tmp_path / "output" / file.path).read_text()
            assert str(tmp_path) not in text
            assert str(llama) not in text
            assert '"seconds"' not in text


def test_the_dense_perplexity_is_computed_once(llama: Path, tmp_path: Path) -> None:
    first: list[Event] = []
    second: list[Event] = []
    one = prune(recipe("wanda", **PERPLEXITY), llama, tmp_path, first).metrics["perplexity"]
    shutil.rmtree(tmp_path / "output")
    two = prune(recipe("magnitude", **PERPLEXITY), llama, tmp_path, second).metrics["perplexity"]
    assert one["dense"] == two["dense"]
    assert one["pruned"] != two["pruned"]
    assert max(event["total"] for event in first if event["type"] == "progress") == 6
    assert max(event["total"] for event in second if event["type"] == "progress") == 3


def test_the_owners_metadata_stays_out_of_the_files(llama: Path, tmp_path: Path) -> None:
    prune(recipe(metadata={"team": "strictly-private"}), llama, tmp_path)
    assert all(b"strictly-private" not in file.read_bytes() for file in (tmp_path / "output").iterdir())


def broken(llama: Path, into: Path, name: str, value: float) -> Path:
    """A copy of the model with one value of a tensor replaced."""
    shutil.copytree(llama, into)
    weights = load_file(into / "model.safetensors")
    weights[name].view(-1)[3] = value
    save_file(weights, into / "model.safetensors", metadata={"format": "pt"})
    return into


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_activation_that_is_not_finite_names_its_block(llama: Path, tmp_path: Path, method: str, value: float) -> None:
    source = broken(llama, tmp_path / "source", "model.layers.1.post_attention_layernorm.weight", value)
    with pytest.raises(ProblemError, match=r"block 1.*layers\.1\.mlp\.gate_proj") as caught:
        prune(recipe(method), source, tmp_path)
    assert caught.value.code == "nonfinite_activation"
    assert list((tmp_path / "output").iterdir()) == []


def test_a_weight_that_is_not_finite_is_not_passed_on(llama: Path, tmp_path: Path) -> None:
    source = broken(llama, tmp_path / "source", "model.layers.2.mlp.down_proj.weight", float("nan"))
    with pytest.raises(ProblemError, match=r"model\.layers\.2\.mlp\.down_proj") as caught:
        prune(recipe("magnitude"), source, tmp_path)
    assert caught.value.code == "verification_failed"


def test_the_seconds_of_pruning_are_neither_those_of_writing_the_model_nor_of_evaluating_it(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the schema says; and the multiple is of those seconds."""

    def slow(*given: Any) -> Any:
        time.sleep(1)
        return gather(*given)

    gather = checkpoints.gather
    monkeypatch.setattr(finishing, "gather", slow)
    result = prune(recipe(**PERPLEXITY), llama, tmp_path)
    seconds = result.metrics["seconds"]
    assert 0 < sum(block["seconds"] for block in result.report["blocks"]) <= seconds["prune"]
    assert seconds["prune"] + 1 + seconds["evaluate"] < seconds["total"]
    assert result.metrics["forward_multiple"] > 0


def test_a_full_disk_leaves_nothing_behind(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(finishing, "gather", full)
    with pytest.raises(ProblemError) as caught:
        prune(recipe("magnitude"), llama, tmp_path)
    assert caught.value.code == "disk_full"
    assert list((tmp_path / "output").iterdir()) == []


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model.layers.1.self_attn.q_norm.weight": None}, "q_norm"),
        ({"model.layers.1.self_attn.q_proj.bias": torch.zeros(32)}, "q_proj.bias"),
        ({"model.layers.0.input_layernorm.weight": torch.ones(31)}, "input_layernorm"),
        ({"something.else": torch.zeros(2)}, "something.else"),
    ],
    ids=["one missing", "one too many", "another shape", "one from elsewhere"],
)
def test_weights_that_from_pretrained_would_not_take_are_named(
    make_model: MakeModel, tmp_path: Path, method: str, change: dict[str, torch.Tensor | None], named: str
) -> None:
    """Whatever the method: also one that never runs the model."""
    source = tmp_path / "source"
    shutil.copytree(make_model("Qwen3ForCausalLM"), source)
    tensors = load_file(source / "model.safetensors") | change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProblemError, match=named) as caught:
        prune(recipe(method), source, tmp_path)
    assert caught.value.code == "model_file_corrupt"


def test_buffers_that_old_versions_saved_stay_where_they_are(llama: Path, tmp_path: Path) -> None:
    source, name = tmp_path / "source", "model.layers.0.self_attn.rotary_emb.inv_freq"
    shutil.copytree(llama, source)
    tensors = load_file(source / "model.safetensors") | {name: torch.rand(4)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    prune(recipe("magnitude"), source, tmp_path)
    assert torch.equal(load_file(tmp_path / "output" / "model.safetensors")[name], tensors[name])


def test_a_config_that_does_not_fit_the_weights_is_told_apart_from_a_crash(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(llama, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(ProblemError) as caught:
        prune(recipe(), source, tmp_path)
    assert caught.value.code == "model_file_corrupt"
    (source / "config.json").write_text(json.dumps(config | {"hidden_act": "__import__"}))
    with pytest.raises(ProblemError) as caught:
        prune(recipe(), source, tmp_path)
    assert caught.value.code == "model_config_invalid"
