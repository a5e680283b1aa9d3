"""Sparsity Induction: whole runs, with every method and on many families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from secateur.problems import ProblemError
from secateur.pruning import admission, pipeline
from secateur.pruning.checkpoint import sha256_of
from secateur.pruning.discovery import family_of
from secateur.pruning.estimate import estimate
from secateur.pruning.events import Event
from secateur.pruning.induction.training import sequences_of_a_step
from secateur.pruning.linears import linears_of
from secateur.recipes import RIA, Magnitude, SparsityInduction
from tests.engine.conftest import MakeModel
from tests.engine.runs import checkpoint, prune, recipe

INDUCTION = {"name": "sparsity_induction"}
METHODS = ["magnitude", "wanda", "ria", "sparsegpt", "statistical_correction"]


def induced(method: str = "wanda", pattern: str | float = 0.5, **settings: Any) -> Any:
    """A recipe that induces sparsity before `method`."""
    return recipe({"name": method, "induction": INDUCTION | settings}, pattern)


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "output" / "model.safetensors")


@pytest.mark.parametrize("pattern", [0.5, "2:4"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_what_was_induced(llama: Path, tmp_path: Path, method: str, pattern: str | float) -> None:
    result = prune(induced(method, pattern), llama, tmp_path)
    assert result.metrics["sparsity"] == pytest.approx(0.5, abs=1e-3)
    before, after = load_file(llama / "model.safetensors"), weights_of(tmp_path)
    assert {name: (each.shape, each.dtype) for name, each in before.items()} == {
        name: (each.shape, each.dtype) for name, each in after.items()
    }
    for block in result.report["blocks"]:
        told = block["induction"]
        errors, chosen = told["choice"]["errors"], told["choice"]["chosen"]
        assert errors.keys() == ({"one", "initial", "trained"} if method == "magnitude" else {"one", "trained"})
        assert errors[chosen] == min(errors.values())
        assert bool(told["folded"]) == (method == "magnitude" and chosen != "one")
        decided = {tuple(each["choices"][0]["errors"]) for each in block["linears"] if each["choices"]}
        if method == "sparsegpt":  # whose update the scales were not learned with
            assert decided == ({("one", "trained")} if chosen == "trained" else set())
        kept = [name for name in before if after[name].bool().all() and name.startswith(f"model.layers.{block['block']}.")]
        changed = {name for name in kept if not torch.equal(before[name], after[name])}
        assert changed == {name for name in told["folded"] if name in kept}


def test_training_lowers_the_error_on_what_it_has_not_seen(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model(layers=2)
    method = {"name": "wanda", "induction": INDUCTION | {"epochs": 3, "learning_rate": 0.02}}
    wanted = recipe(method, "2:4", calibration={"samples": 40, "sequence_length": 32})
    blocks = prune(wanted, model, tmp_path).report["blocks"]
    for block in blocks:
        errors = block["induction"]["choice"]["errors"]
        assert errors["trained"] < 0.97 * errors["one"]


@pytest.mark.parametrize(("total", "expected"), [(31, 8), (64, 8), (6, 2), (1, 1)])
def test_an_epoch_of_few_sequences_still_has_steps(total: int, expected: int) -> None:
    assert sequences_of_a_step(SparsityInduction(name="sparsity_induction"), total) == expected


def test_a_block_that_training_harms_stays_as_it_is(llama: Path, tmp_path: Path) -> None:
    harmful: dict[str, Any] = {"learning_rate": 1.0, "epochs": 5}
    guarded = prune(induced(**harmful), llama, tmp_path / "guarded").report["blocks"]
    left = [block for block in guarded if block["induction"]["choice"]["chosen"] == "one"]
    assert left
    for block in left:
        errors = block["induction"]["choice"]["errors"]
        assert errors["one"] <= errors["trained"]
    alone = prune(induced(guard=False, **harmful), llama, tmp_path / "alone").report["blocks"]
    assert [block["induction"]["choice"] for block in alone] == [{"chosen": "trained", "errors": {}}] * 3


def test_scales_of_one_leave_the_pruning_as_it_is(llama: Path, tmp_path: Path) -> None:
    prune(induced(epochs=0, guard=False), llama, tmp_path / "induced")
    prune(recipe(), llama, tmp_path / "plain")
    ours, plain = (weights_of(tmp_path / name) for name in ("induced", "plain"))
    differing = sum(int(((ours[name] == 0) != (plain[name] == 0)).sum()) for name in plain)
    assert differing <= 1e-3 * sum(weight.numel() for weight in plain.values())


def test_magnitude_folded_by_the_inputs_sizes_prunes_as_wanda_and_the_function_stays(llama: Path, tmp_path: Path) -> None:
    folded = induced("magnitude", epochs=0, guard=False)
    result = prune(folded, llama, tmp_path / "folded")
    assert [block["induction"]["choice"]["chosen"] for block in result.report["blocks"]] == ["initial"] * 3
    names = {"input_layernorm", "post_attention_layernorm"}
    for index, block in enumerate(result.report["blocks"]):
        assert set(block["induction"]["folded"]) == {f"model.layers.{index}.{name}.weight" for name in names}
    plain = prune(recipe({"name": "magnitude", "comparison": "row"}), llama, tmp_path / "magnitude")
    prune(recipe("wanda", propagate="block"), llama, tmp_path / "wanda")
    assert plain.metrics["sparsity"] == result.metrics["sparsity"]
    after, magnitude, wanda = (weights_of(tmp_path / name) for name in ("folded", "magnitude", "wanda"))
    name = "model.layers.0.mlp.gate_proj.weight"
    agreeing = [float(((after[name] == 0) == (other[name] == 0)).float().mean()) for other in (wanda, magnitude)]
    assert agreeing[0] > agreeing[1]
    card = (tmp_path / "folded" / "output" / "README.md").read_text()
    assert "scales were folded" in card


class KilledError(BaseException):
    """Ends a run the way a kill does: nothing is cleaned up."""


@pytest.mark.parametrize("pattern", [0.6, "4:8"])
def test_before_sparsegpt_what_is_refused_everywhere_leaves_the_bytes_as_they_are_without(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str | float
) -> None:
    monkeypatch.setattr("secateur.pruning.group_pruner.LEAST_GAIN", 1.0)
    report = prune(induced("sparsegpt", pattern), llama, tmp_path / "induced").report
    assert {block["induction"]["choice"]["chosen"] for block in report["blocks"]} >= {"trained"}
    prune(recipe("sparsegpt", pattern), llama, tmp_path / "plain")
    ours, plain = (sha256_of(tmp_path / name / "output" / "model.safetensors") for name in ("induced", "plain"))
    assert ours == plain


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_run_that_was_killed_ends_with_the_same_bytes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def die_after_one(event: Event) -> None:
        if event.get("done") == 1:
            raise KilledError

    def run(into: str, *earlier: Path, on_event: Any = lambda _: None) -> Any:
        folder = tmp_path / into
        return pipeline.run(
            induced(method, "2:4"), source=llama, output=folder, cache=tmp_path / "cache", on_event=on_event, earlier=earlier
        )

    with monkeypatch.context() as patch:
        patch.setattr("secateur.pruning.pipeline.shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(KilledError):
            run("killed", on_event=die_after_one)
    told: list[Event] = []
    again = run("again", tmp_path / "killed", on_event=told.append)
    assert next(event["done"] for event in told if event["type"] == "progress") == 1
    assert again.files == run("undisturbed").files


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "OPTForCausalLM", "MixtralForCausalLM", "Gemma2ForCausalLM"])
def test_other_families(make_family_model: MakeModel, tmp_path: Path, architecture: str) -> None:
    for method in ("magnitude", "wanda"):
        result = prune(induced(method, guard=False, epochs=1), make_family_model(architecture), tmp_path / method)
        assert result.metrics["sparsity"] == pytest.approx(0.5, abs=1e-2)
        if method == "magnitude":
            report = json.loads((tmp_path / method / "output" / "compression_report.json").read_text())
            refused = report["blocks"][0]["induction"]["refused"]
            assert all(len(reason) > 10 for reason in refused.values())
            assert ("fc1_fc2" in refused) == (architecture == "GPT2LMHeadModel")


def test_a_family_whose_wiring_is_not_known_takes_the_multiplier_and_refuses_the_fold(
    make_family_model: MakeModel, tmp_path: Path
) -> None:
    source = make_family_model("PhiForCausalLM")
    prune(induced("wanda"), source, tmp_path)
    with checkpoint(source) as model, pytest.raises(ProblemError) as refused:
        admission.check(induced("magnitude"), model.headers)
    assert refused.value.code == "induction_unavailable"
    assert "wired" in str(refused.value)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"name": "dsnot"}, "not dsnot"),
        ({"name": "alps"}, "not alps"),
        ({"name": "magnitude", "comparison": "layer"}, "within a row"),
        ({"name": "ria", "comparison": "layer"}, "within a row"),
        ({"name": "statistical_correction", "alpha": "auto"}, "give a number"),
    ],
)
def test_what_induction_does_not_go_with_is_refused(method: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        recipe(method | {"induction": INDUCTION})


def test_with_induction_weights_compete_within_a_row_unless_it_is_said_otherwise() -> None:
    for method in ("magnitude", "ria"):
        plain, with_induction = recipe({"name": method}).method, induced(method).method
        assert isinstance(plain, Magnitude | RIA)
        assert isinstance(with_induction, Magnitude | RIA)
        assert (plain.comparison, with_induction.comparison) == ("layer", "row")


def test_the_guard_takes_two_samples(llama: Path) -> None:
    wanted = induced().model_copy(
        update={"calibration": recipe(calibration={"samples": 1, "sequence_length": 32}).calibration}
    )
    with checkpoint(llama) as model, pytest.raises(ProblemError) as refused:
        admission.check(wanted, model.headers)
    assert refused.value.code == "calibration_too_small"


def test_an_estimate_counts_the_training(llama: Path) -> None:
    with checkpoint(llama) as model:
        plain, once, thrice = (
            estimate(each, model.headers).work for each in (recipe(), induced(epochs=1), induced(epochs=3))
        )
        assert linears_of(model.headers, family_of(model.headers))
    assert 3 * plain < once < thrice
    assert thrice - once == pytest.approx(2 * (once - plain), rel=0.5)
