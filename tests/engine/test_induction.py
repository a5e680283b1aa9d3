"""Sparsity Induction: the refresh, the gradient through the mask, the spectral term, training, guard and whole runs."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from secateur.problems import ProblemError
from secateur.pruning import admission, pipeline
from secateur.pruning.allocation import Target
from secateur.pruning.compensation import mean_corrected
from secateur.pruning.discovery import family_of
from secateur.pruning.estimate import estimate
from secateur.pruning.events import Event
from secateur.pruning.induction.initial import initial_scales
from secateur.pruning.induction.relaxation import gradient, relax, sorted_columns
from secateur.pruning.induction.scales import Scale, multiplier
from secateur.pruning.induction.scores import log_scores
from secateur.pruning.induction.spectral import SpectralTerm, power_iteration
from secateur.pruning.lanes import lanes
from secateur.pruning.linears import linears_of
from secateur.pruning.masks import removal_mask
from secateur.pruning.methods import Pruned
from secateur.pruning.methods.magnitude import magnitude_scores
from secateur.pruning.methods.wanda import wanda_scores
from secateur.pruning.registry import METHODS as METHODS_BY_NAME
from secateur.pruning.statistics import Gram, InputMoments
from secateur.recipes import RIA, Magnitude, SparsityInduction, Wanda
from tests.engine.conftest import MakeModel
from tests.engine.layers import layer, observed
from tests.engine.runs import checkpoint, prune, recipe

INDUCTION = {"name": "sparsity_induction"}
METHODS = ["magnitude", "wanda", "ria", "sparsegpt", "statistical_correction"]
HALF, TWO_OF_FOUR = Target("linear", Fraction(1, 2)), Target("linear", Fraction(1, 2), (2, 4))


def induced(method: str = "wanda", pattern: str | float = 0.5, **settings: Any) -> Any:
    """A recipe that induces sparsity before `method`."""
    return recipe({"name": method, "induction": INDUCTION | settings}, pattern)


def scales_in(seed: int, count: int) -> Tensor:
    """Random scales between a fourth and four, (count,)."""
    return torch.exp(math.log(4) * (2 * torch.rand(count, generator=torch.Generator().manual_seed(seed)) - 1))


def moments_of(inputs: Tensor) -> InputMoments:
    moments = observed("moments", inputs)
    assert isinstance(moments, InputMoments)
    return moments


# The refresh: equations 9 to 11


def test_the_refreshed_score_is_wandas_on_the_scaled_inputs() -> None:
    weight, inputs = layer()
    scale = scales_in(1, 96)
    cached = log_scores(Wanda(name="wanda"), weight, moments_of(inputs))
    again = wanda_scores(weight, moments_of(inputs * scale).squares.sqrt())
    torch.testing.assert_close((cached + scale.log()).exp(), again, rtol=1e-5, atol=0)


def test_the_grams_diagonal_follows_the_squares_of_the_scale() -> None:
    _, inputs = layer()
    scale = scales_in(1, 96)
    before, after = (observed("gram", each) for each in (inputs, inputs * scale))
    assert isinstance(before, Gram)
    torch.testing.assert_close(after.squares, scale.square() * before.squares, rtol=1e-5, atol=0)


@pytest.mark.parametrize("target", [HALF, TWO_OF_FOUR])
def test_a_fold_moves_magnitudes_mask_and_leaves_wandas_and_the_output(target: Target) -> None:
    weight, inputs = layer()
    weight, inputs, scale = weight.double(), inputs.double(), scales_in(1, 96).double()
    folded, divided = weight * scale, inputs / scale
    masks = [
        removal_mask(wanda_scores(each, moments_of(its).squares.sqrt()), target, "row")
        for each, its in ((weight, inputs), (folded, divided))
    ]
    assert torch.equal(*masks)
    torch.testing.assert_close((folded * ~masks[0]) @ divided.T, (weight * ~masks[0]) @ inputs.T, rtol=1e-6, atol=1e-9)
    plain, other = (removal_mask(magnitude_scores(each), target, "row") for each in (weight, folded))
    assert int((plain != other).sum()) > 0.1 * plain.numel()


def test_the_shift_that_is_the_mean_input_leaves_no_mean_error_and_no_other_is_better() -> None:
    weight, inputs = layer(mean=1.0)
    removed = removal_mask(magnitude_scores(weight), HALF, "row")
    pruned = Pruned(weight * ~removed, removed, 0.0, "weights")
    done = mean_corrected(weight, pruned, inputs.mean(dim=0), torch.zeros(len(weight)))
    assert done.bias is not None
    lost = inputs @ (weight - done.weight).T  # (tokens, out_features)
    assert float((lost - done.bias).mean(dim=0).abs().max()) < 1e-4 * float(lost.abs().max())
    least = float((lost - done.bias).square().mean())
    for seed in range(5):
        other = done.bias + 0.1 * torch.randn(len(weight), generator=torch.Generator().manual_seed(seed))
        assert least < float((lost - other).square().mean())
    assert least < float(lost.square().mean())


@pytest.mark.parametrize("method", ["wanda", "ria", "sparsegpt", "statistical_correction"])
@pytest.mark.parametrize("target", [HALF, TWO_OF_FOUR])
def test_an_emphasis_decides_what_goes_and_nothing_else(method: str, target: Target) -> None:
    weight, inputs = layer()
    emphasis = torch.tensor([1e-9, 1.0]).repeat(48)  # every other input counts for nothing
    card = METHODS_BY_NAME[method]
    made = card.load()(recipe({"name": method} | ({"comparison": "row"} if method == "ria" else {})).method)
    prepared = made.prepare(observed(card.observes if method != "statistical_correction" else "norms", inputs))
    (done,) = made.prune([weight], [target], prepared, emphasis)
    assert bool(done.removed[:, ::2].all())
    assert not bool(done.removed[:, 1::2].any())
    (alike,) = made.prune([weight], [target], prepared, torch.ones(96))
    (plain,) = made.prune([weight], [target], prepared)
    assert torch.equal(alike.weight, plain.weight)
    if method != "sparsegpt":  # which makes up for what went
        assert torch.equal(done.weight[:, 1::2], weight[:, 1::2])


# The gradient through the mask


@pytest.mark.parametrize("group", [2, 4, 5, 8])
def test_columns_are_sorted_within_groups(group: int) -> None:
    values = torch.randn(6, 5 * group, generator=torch.Generator().manual_seed(0))
    expected = values.view(6, 5, group).sort(dim=2).values
    assert torch.equal(torch.stack(sorted_columns(values, group), dim=2), expected)


def softly(logs: Tensor, group: int, kept: int, tau: float) -> Tensor:
    """Sigmoids of (l - t) / tau with t such that those of each `group` add up to `kept`: by halving, in float64."""
    grouped = logs.view(len(logs), -1, group)
    low, high = grouped.amin(dim=2, keepdim=True) - 9, grouped.amax(dim=2, keepdim=True) + 9
    for _ in range(80):
        middle = (low + high) / 2
        too_many = ((grouped - middle) / tau).sigmoid().sum(dim=2, keepdim=True) > kept
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    return ((grouped - low) / tau).sigmoid().view_as(logs)


@pytest.mark.parametrize(("target", "group"), [(HALF, 24), (TWO_OF_FOUR, 4)])
def test_the_masks_gradient_is_that_of_sigmoids_whose_sum_does_not_change(
    target: Target, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, tau = torch.Generator().manual_seed(0), 0.5
    weight, of_masked, logs = (torch.randn(6, 24, generator=generator, dtype=torch.float64) for _ in range(3))

    def threshold_of_the_sigmoids(scores: Tensor, _: Target) -> Tensor:
        soft = softly(scores, group, group // 2, tau)
        return tau * (soft / (1 - soft)).log()

    monkeypatch.setattr("secateur.pruning.induction.relaxation._less_threshold", threshold_of_the_sigmoids)
    found = gradient(relax(weight, logs, torch.zeros(24, dtype=torch.float64), target, tau), of_masked)
    for column in range(24):
        step = torch.zeros(24, dtype=torch.float64)
        step[column] = 1e-5
        up, down = (softly(logs + each, group, group // 2, tau) for each in (step, -step))
        expected = float((of_masked * weight * (up - down)).sum()) / 2e-5
        assert float(found[column]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("target", [HALF, TWO_OF_FOUR, Target("linear", Fraction(1, 4), (6, 8))])
def test_the_mask_in_training_is_the_one_that_prunes(target: Target) -> None:
    weight, inputs = layer()
    scores, theta = log_scores(Wanda(name="wanda"), weight, moments_of(inputs)), scales_in(1, 96).log()
    relaxed = relax(weight, scores, theta, target, 0.2)
    assert torch.equal(relaxed.masked == 0, removal_mask(scores + theta, target, "row"))
    again = relax(weight, scores + 3.0, theta, target, 0.2)  # a factor for all changes neither mask nor slope
    torch.testing.assert_close(again.slope, relaxed.slope, rtol=1e-3, atol=1e-5)


# The spectral term


def test_the_power_method_finds_the_spectral_norm_of_the_scaled_weight() -> None:
    weight, scale = layer()[0], scales_in(2, 96)
    sigma, _ = power_iteration(weight, scale, torch.ones(96), 300)
    assert float(sigma) == pytest.approx(float(torch.linalg.matrix_norm(weight * scale, 2)), rel=1e-3)


def spectral_term(strength: float, alpha: float) -> tuple[SpectralTerm, list[Scale], dict[str, Tensor]]:
    weights = {}
    for seed, (name, rows) in enumerate([("q", 24), ("k", 12), ("down", 40)]):
        weight, inputs = layer(rows, seed=seed)
        weights[name] = weight + torch.outer(weight[:, 0], inputs[0])  # one singular value stands out, as in a model
    scales = [multiplier(("q", "k"), 96, torch.device("cpu")), Scale("tied", {"down": torch.arange(96) // 2}, 48)]
    return SpectralTerm(weights, scales, strength, alpha, lanes(torch.device("cpu"))), scales, weights


def test_the_spectral_terms_gradient_is_that_of_its_value() -> None:
    term, scales, weights = spectral_term(0.5, 2.0)
    thetas = [scales_in(3, scale.free).log() / 4 for scale in scales]
    for _ in range(150):  # until the power method has arrived
        value, found = term.gradients(thetas)
    leaves = [theta.clone().requires_grad_() for theta in thetas]
    with torch.enable_grad():
        norms = [
            torch.linalg.matrix_norm(weights[name] * scale.spread(leaf, name).exp(), 2)
            for scale, leaf in zip(scales, leaves, strict=True)
            for name in scale.linears
        ]
        at_one = sum(torch.linalg.matrix_norm(weight, 2) for weight in weights.values())
        expected = 0.5 * torch.exp(-2.0 * torch.stack(norms).sum() / at_one)
        gradients = torch.autograd.grad(expected, leaves)
    assert value == pytest.approx(float(expected.detach()), rel=1e-2)
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02 * float(theirs.abs().max()))


def test_at_its_default_weight_the_spectral_term_has_a_gradient_where_the_papers_has_none() -> None:
    wanted = SparsityInduction(name="sparsity_induction")
    assert wanted.spectral_weight > 0
    term, scales, weights = spectral_term(wanted.spectral_weight, wanted.spectral_alpha)
    _, found = term.gradients([torch.zeros(scale.free) for scale in scales])
    assert all(float(each.abs().max()) > 1e-6 for each in found)
    of_a_block = 30 * sum(torch.linalg.matrix_norm(weight, 2) for weight in weights.values())
    assert float(torch.exp(-of_a_block)) == 0.0


def test_scales_begin_where_the_recipe_says() -> None:
    _, inputs = layer(mean=1.0)
    assert torch.equal(initial_scales("one", inputs), torch.ones(96))
    torch.testing.assert_close(initial_scales("rms", inputs), inputs.square().mean(dim=0).sqrt())
    found = initial_scales("data", inputs)
    expected = (inputs.quantile(0.5, dim=0, interpolation="lower") - inputs.mean(dim=0)).square()
    floored = found > expected * 1.001
    torch.testing.assert_close(found[~floored], expected[~floored], rtol=1e-4, atol=1e-7)
    assert bool(floored.any())  # what the paper's equation gives is nearly zero somewhere
    assert float(found.min()) > 0.009 * float(expected.mean())


# Whole runs


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


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
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
