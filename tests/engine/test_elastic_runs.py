"""Elastic jobs from beginning to end: an artifact is made, read back, materialised, and measured."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from secateur.problems import ProblemError
from secateur.pruning.checkpoint import Checkpoint, open_shard, sha256_of, write_shard
from secateur.pruning.discovery import family_of
from secateur.pruning.elastic.artifact import HEADER, TENSORS
from secateur.pruning.linears import linears_of
from tests.engine.conftest import MakeModel
from tests.engine.runs import checkpoint, elastic_recipe, export_recipe, prune, recipe

ROOT = Path(__file__).parents[2]
PERPLEXITY = {"dataset": "wikitext2-sample", "sequence_length": 32, "max_windows": 4}


def digests(folder: Path) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in folder.iterdir()}


def zeros(folder: Path) -> tuple[int, int]:
    """Zeros of the linears, and their weights."""
    with checkpoint(folder) as model:
        names = [linear.name for block in linears_of(model.headers, family_of(model.headers)) for linear in block]
        weights = [model.read(name) for name in names]
    return sum(int((weight == 0).sum()) for weight in weights), sum(weight.numel() for weight in weights)


@pytest.fixture(scope="module")
def artifact(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The elastic model of a small Llama."""
    into = tmp_path_factory.mktemp("elastic")
    prune(elastic_recipe(), make_model(), into)
    return into / "output"


def test_one_artifact_serves_ten_sparsities_each_exact_and_loadable(artifact: Path, tmp_path: Path) -> None:
    for percent in (5, 20, 33, 40, 45, 52, 63, 70, 77, 90):
        result = prune(export_recipe(percent / 100), artifact, tmp_path / str(percent))
        gone, weights = zeros(tmp_path / str(percent) / "output")
        assert 0 <= weights * percent / 100 - gone < len(result.report["blocks"]) * 7
        assert result.metrics["sparsity"] == gone / weights
    for percent in (33, 77):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(percent) / "output")
        assert torch.isfinite(model(torch.arange(8).unsqueeze(0)).logits).all()


def test_the_same_request_gives_the_same_bytes_and_a_nested_mask(artifact: Path, tmp_path: Path) -> None:
    for name, rate in (("once", 0.63), ("again", 0.63), ("more", 0.71)):
        prune(export_recipe(rate), artifact, tmp_path / name)
    assert digests(tmp_path / "once" / "output") == digests(tmp_path / "again" / "output")
    with checkpoint(tmp_path / "once" / "output") as less, checkpoint(tmp_path / "more" / "output") as more:
        for block in linears_of(less.headers, family_of(less.headers)):
            for linear in block:
                assert not ((less.read(linear.name) == 0) & (more.read(linear.name) != 0)).any()


def test_a_request_may_allocate_sparsity_among_blocks(artifact: Path, tmp_path: Path) -> None:
    result = prune(export_recipe(0.5, {"name": "per_block", "ratios": [1, 2, 3]}), artifact, tmp_path / "ratios")
    found = [sum(linear["zeros"] for linear in block["linears"]) for block in result.report["blocks"]]
    assert sum(found) == zeros(artifact)[1] // 2
    assert found == pytest.approx([sum(found) / 6, sum(found) / 3, sum(found) / 2], rel=0.01)
    owl = prune(export_recipe(0.5, {"name": "owl", "outlier": 3}), artifact, tmp_path / "owl").report["blocks"]
    assert len({block["score"] for block in owl}) == 3
    assert sum(linear["zeros"] for block in owl for linear in block["linears"]) == sum(found)
    with pytest.raises(ProblemError) as refused:
        prune(export_recipe(0.5, {"name": "per_block", "ratios": [1, 2]}), artifact, tmp_path / "short")
    assert refused.value.code == "allocation_impossible"


def test_untrained_it_is_wanda_of_the_dense_model_bit_for_bit(llama: Path, tmp_path: Path) -> None:
    untrained = {"epochs": 1, "learning_rate": 0.0, "base_learning_rate": 0.0}
    prune(elastic_recipe(method=untrained), llama, tmp_path / "elastic")
    for rate in (0.3, 0.55):
        prune(export_recipe(rate), tmp_path / "elastic" / "output", tmp_path / f"epts-{rate}")
        prune(recipe("wanda", rate, propagate="none"), llama, tmp_path / f"wanda-{rate}")
        ours, wanda = (tmp_path / f"{name}-{rate}" / "output" / "model.safetensors" for name in ("epts", "wanda"))
        assert sha256_of(ours) == sha256_of(wanda)


def test_with_its_weights_as_they_were_the_base_is_the_model_itself(llama: Path, tmp_path: Path) -> None:
    prune(elastic_recipe(method={"train_base": False}), llama, tmp_path)
    assert sha256_of(tmp_path / "output" / "model.safetensors") == sha256_of(llama / "model.safetensors")


def test_the_artifact_is_hardly_larger_than_its_base(artifact: Path, make_model: MakeModel, tmp_path: Path) -> None:
    result = prune(elastic_recipe(method={"epochs": 1}), make_model(), tmp_path)
    told = result.metrics["artifact"]
    assert told["base_bytes"] == sum(tensor.end - tensor.start for tensor in checkpoint(artifact).headers.tensors.values())
    assert told["bytes"] - told["base_bytes"] == (artifact / TENSORS).stat().st_size


@pytest.mark.parametrize("streams", ["mixed", "groups"])
def test_any_depth_and_any_bands(make_model: MakeModel, tmp_path: Path, streams: str) -> None:
    method = {"epochs": 1, "bands": "three", "streams": streams, "every_band": True, "sequences_per_step": 4}
    prune(elastic_recipe(method=method), make_model(layers=34), tmp_path)
    header = json.loads((tmp_path / "output" / HEADER).read_text())
    assert [band["rank"] for band in header["bands"]] == [24, 16, 16]
    with Checkpoint(tmp_path / "output", checkpoint(tmp_path / "output").headers) as base:
        assert "model.layers.33.mlp.down_proj.weight" in base
    prune(export_recipe(0.85), tmp_path / "output", tmp_path / "export")
    assert zeros(tmp_path / "export" / "output")[0] > 0


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "OPTForCausalLM", "Qwen3ForCausalLM", "MixtralForCausalLM"])
def test_other_families(make_family_model: MakeModel, tmp_path: Path, architecture: str) -> None:
    source = make_family_model(architecture)
    prune(elastic_recipe(method={"epochs": 1}), source, tmp_path / "elastic")
    prune(export_recipe(0.5), tmp_path / "elastic" / "output", tmp_path / "half")
    gone, weights = zeros(tmp_path / "half" / "output")
    assert gone == pytest.approx(weights / 2, rel=0.01)


def test_the_curve_is_measured_with_other_methods_beside_it(llama: Path, tmp_path: Path) -> None:
    wanted = {"perplexity": PERPLEXITY, "sparsities": [0.4, 0.6], "beside": [{"name": "wanda"}]}
    metrics = prune(elastic_recipe(evaluation=wanted), llama, tmp_path).metrics
    assert [point["sparsity"] for point in metrics["curve"]] == [0.4, 0.6]
    single = prune(recipe("wanda", 0.6, evaluation={"perplexity": PERPLEXITY}), llama, tmp_path / "wanda").metrics
    assert metrics["curve"][1]["perplexity"]["wanda"] == single["perplexity"]["pruned"]
    export = export_recipe(0.6, evaluation={"perplexity": PERPLEXITY})
    materialised = prune(export, tmp_path / "output", tmp_path / "export").metrics
    assert metrics["curve"][1]["perplexity"]["epts"] == pytest.approx(materialised["perplexity"]["pruned"])
    assert metrics["forward_multiple"] > 0
    assert not list((tmp_path / "output").glob(".*"))


def test_killed_it_goes_on_and_ends_with_the_same_bytes(make_model: MakeModel, tmp_path: Path) -> None:
    model, layers = make_model(layers=20), 20
    prune(elastic_recipe(), model, tmp_path / "undisturbed")
    dice, earlier = random.Random(), list[str]()
    for attempt in range(3):
        into = tmp_path / str(attempt)
        command = [sys.executable, "-m", "tests.engine.killed", str(model), str(into), "epts", "-", *earlier]
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        lines = []
        if attempt < 2:
            lines = [child.stdout.readline() for _ in range(dice.randint(5, 9))]
            child.send_signal(signal.SIGKILL)
        lines += child.communicate()[0].splitlines()
        done = [int(line.split()[1]) for line in lines if line.startswith("progress ") and len(line.split()) == 2]
        assert attempt == 0 or done[0] > 0
        earlier.insert(0, str(into / "output"))
    assert done[-1] == layers
    assert digests(tmp_path / "2" / "output") == digests(tmp_path / "undisturbed" / "output")


# What is read back is hostile


@pytest.fixture
def spoilt(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "spoilt"))


def refusal(folder: Path, tmp_path: Path) -> ProblemError:
    with pytest.raises(ProblemError) as refused:
        prune(export_recipe(0.5), folder, tmp_path / "refused")
    assert not list((tmp_path / "refused" / "output").iterdir())
    return refused.value


def test_a_model_that_is_not_elastic_is_refused(llama: Path, tmp_path: Path) -> None:
    assert refusal(llama, tmp_path).code == "model_not_elastic"


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"format": "pickle"},
        {"bands": []},
        {"bands": [{"upper": 0.5, "rank": 10_000, "weight": 1.0}]},
        {"bands": [{"upper": 0.5, "rank": 8, "weight": 1.0}]},
        {"low_band_off": [-1]},
        {"tensors_sha256": "0" * 64},
        {"base_sha256": "0" * 64},
        {"unknown": 1},
    ],
)
def test_a_header_that_is_wrong_is_refused(spoilt: Path, tmp_path: Path, change: dict[str, object]) -> None:
    document = json.loads((spoilt / HEADER).read_text())
    (spoilt / HEADER).write_text(json.dumps(document | change))
    assert refusal(spoilt, tmp_path).code == "model_file_corrupt"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": NaN}'])
def test_a_header_that_is_no_json_object_is_refused(spoilt: Path, tmp_path: Path, text: str) -> None:
    (spoilt / HEADER).write_text(text)
    assert refusal(spoilt, tmp_path).code == "model_file_corrupt"


@pytest.mark.parametrize("spoil", ["missing", "shape", "nan", "negative"])
def test_tensors_that_do_not_fit_are_refused_though_their_digest_does(spoilt: Path, tmp_path: Path, spoil: str) -> None:
    with open_shard(spoilt / TENSORS) as shard:
        tensors = {name: shard.read(name) for name in shard.headers.tensors}
    name = next(name for name in tensors if name.endswith("input_norms"))
    if spoil == "missing":
        del tensors[name]
    elif spoil == "shape":
        tensors[name] = tensors[name][:-1]
    else:
        tensors[name][0] = float("nan") if spoil == "nan" else -1.0
    write_shard(spoilt / TENSORS, tensors)
    document = json.loads((spoilt / HEADER).read_text())
    (spoilt / HEADER).write_text(json.dumps(document | {"tensors_sha256": sha256_of(spoilt / TENSORS)}))
    assert refusal(spoilt, tmp_path).code == "model_file_corrupt"
