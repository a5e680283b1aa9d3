"""Closed forms of compensation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from secateur.problems import ProblemError
from secateur.pruning.calibration import calibration_set, tokenise
from secateur.pruning.compensation import (
    compensated,
    least_squares_factors,
    matching_factors,
    output_moments,
)
from secateur.pruning.datasets import read_text
from secateur.pruning.energy import _line, energy_compensated
from secateur.pruning.families import FAMILIES
from secateur.pruning.methods import Pruned
from secateur.pruning.statistics import InputSample, chosen_tokens
from secateur.recipes import EnergyCompensation, LeastSquares, VarianceMatching
from tests.engine.conftest import MakeModel
from tests.engine.runs import checkpoint, prune, recipe

WIDE = (1e-6, 1e6)  # a clamp that does not clamp


def problem(seed: int = 0, out_features: int = 40, in_features: int = 30, mean: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) + mean
    return weight, torch.rand(out_features, in_features, generator=generator) < 0.5


def of_mask(weight: Tensor, removed: Tensor) -> Pruned:
    return Pruned(weight.masked_fill(removed, 0.0), removed, 0.5, "diagonal")


def energy(weight: Tensor, removed: Tensor, **constants: Any) -> Tensor:
    """A weight after energy compensation of what is left of it."""
    wanted = EnergyCompensation(name="energy", **constants)
    return energy_compensated(weight, of_mask(weight, removed), wanted).weight


def by_name(name: str, weight: Tensor, removed: Tensor, inputs: Tensor) -> Tensor:
    if name == "energy":
        return energy(weight, removed)
    kinds: dict[str, Any] = {"variance_matching": VarianceMatching, "least_squares": LeastSquares}
    return compensated(weight, of_mask(weight, removed), kinds[name](name=name), inputs).weight


def papers_step(dense: Tensor, left: Tensor, dim: int, *, epsilon: float, clamp: tuple[float, float]) -> Tensor:
    """A step of energy compensation by the paper's equations, along `dim`, before the mask is applied again, in float64."""
    mean = dense.mean(dim=dim, keepdim=True)
    spread, spread_left = ((each - mean).square().sum(dim=dim, keepdim=True) for each in (dense, left))
    lowest = torch.finfo(torch.float64).tiny
    factors = (spread / (spread_left + epsilon * spread).clamp_min(lowest)).sqrt()
    return (left - mean) * factors.where(spread_left > 0, 1.0).clamp(*clamp) + mean


def papers_energy(
    weight: Tensor, removed: Tensor, *, epsilon: float = 1e-8, clamp: tuple[float, float] = (0.8, 1.5)
) -> Tensor:
    """Both steps; means and energies are always those of the dense weight."""
    result, dense = weight.double().masked_fill(removed, 0.0), weight.double()
    for dim in (0, 1):
        result = papers_step(dense, result, dim, epsilon=epsilon, clamp=clamp).masked_fill(removed, 0.0)
    return result


@pytest.mark.parametrize("clamp", [WIDE, (0.8, 1.5), (1.0, 1.1)])
def test_energy_compensation_is_the_papers_two_steps_within_the_clamp(clamp: tuple[float, float]) -> None:
    weight, removed = problem()
    result = energy(weight, removed, epsilon=0.0, clamp=clamp)
    expected = papers_energy(weight, removed, epsilon=0.0, clamp=clamp)
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)


def test_energy_compensation_tells_how_many_factors_the_clamp_held_back() -> None:
    weight, removed = problem()
    wanted = {"tight": (1.0, 1.0), "wide": WIDE}
    told = {
        name: energy_compensated(weight, of_mask(weight, removed), EnergyCompensation(name="energy", clamp=clamp)).fallbacks
        for name, clamp in wanted.items()
    }
    assert told == {"tight": (f"factors_clamped:{sum(weight.shape)}",), "wide": ()}
    nothing = torch.zeros_like(removed)
    untouched = energy_compensated(weight, of_mask(weight, nothing), EnergyCompensation(name="energy", clamp=(1.0, 1.5)))
    assert untouched.fallbacks == ()


def test_a_column_has_its_energy_before_the_mask_and_a_known_one_behind_it() -> None:
    weight, removed = problem()
    dense, left = weight.double(), weight.double().masked_fill(removed, 0.0)
    sums = torch.stack([each.sum(dim=0) for each in (dense, dense.square(), left, left.square())])
    wanted = EnergyCompensation(name="energy", epsilon=0.0, clamp=WIDE)
    line, mean = _line(sums, len(weight), wanted), dense.mean(dim=0)
    scaled, energy = left * line.factor + line.shift, (dense - mean).square().sum(dim=0)
    torch.testing.assert_close((scaled - mean).square().sum(dim=0), energy, rtol=1e-6, atol=0)
    expected = energy - removed.sum(dim=0) * mean.square() * (line.factor.double().square() - 1)
    masked = scaled.masked_fill(removed, 0.0)
    torch.testing.assert_close((masked - mean).square().sum(dim=0), expected, rtol=1e-6, atol=0)


def test_columns_and_rows_that_do_not_vary_or_of_which_nothing_is_left_are_as_defined() -> None:
    """Nothing but zeros has a factor of one; a constant column loses spread that it never had, so it goes to its mean as far
    as the clamp lets it; a zero that stays in a row with a mean is no longer zero, as the paper has it."""
    weight, removed = problem(mean=0.0)
    weight[:, 0], removed[:, 0] = 0.0, True
    weight[:, 1], removed[:, 1] = 0.0, False
    weight[:, 2], removed[:20, 2] = 2.0, True
    weight[0], weight[1], removed[2] = 0.0, 1.5, True
    result = energy(weight, removed)
    assert bool(result.isfinite().all())
    torch.testing.assert_close(result.double(), papers_energy(weight, removed), rtol=1e-5, atol=1e-6)
    assert bool((result[removed] == 0).all())
    assert float(result[5:, 1].abs().max()) > 0


def test_weights_without_a_mean_have_exactly_their_energy_again() -> None:
    """Columns and rows of opposite pairs: with no mean, what the mask zeroes is the centre."""
    weight, removed = problem(mean=0.0)
    weight = torch.cat([torch.cat([weight, -weight], dim=0), torch.cat([-weight, weight], dim=0)], dim=1)  # (80, 60)
    removed = removed.repeat(2, 2)
    result = energy(weight, removed, epsilon=0.0, clamp=WIDE)
    torch.testing.assert_close(result.square().sum(dim=1), weight.square().sum(dim=1))


@pytest.mark.parametrize("mean", [0.3, 100.0])
@pytest.mark.parametrize("name", ["energy", "variance_matching"])
def test_where_nothing_is_removed_nothing_changes(name: str, mean: float) -> None:
    weight, _ = problem(mean=mean)
    result = by_name(name, weight, torch.zeros_like(weight, dtype=torch.bool), torch.randn(50, 30))
    torch.testing.assert_close(result, weight, rtol=1e-6, atol=1e-6)


def test_energy_compensation_of_many_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, removed = problem(out_features=101)
    whole = energy(weight, removed)
    monkeypatch.setattr("secateur.pruning.energy.MOST_ELEMENTS", 7 * weight.shape[1])
    made = energy_compensated(weight, of_mask(weight, removed), EnergyCompensation(name="energy"))
    torch.testing.assert_close(made.weight, whole)
    error = (weight - whole).square().sum() / weight.square().sum()
    assert made.error == pytest.approx(float(error), rel=1e-5)
    assert made.error_measure == "weights"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), name=st.sampled_from(["energy", "variance_matching", "least_squares"]))
def test_what_is_removed_stays_removed(seed: int, name: str) -> None:
    weight, removed = problem(seed)
    removed[:, 3], removed[5] = True, True  # a column and a row with nothing left
    inputs = torch.randn(64, 30, generator=torch.Generator().manual_seed(seed))
    result = by_name(name, weight, removed, inputs)
    assert bool((result[removed] == 0).all())
    assert not bool(torch.signbit(result[removed]).any())
    assert bool(result.isfinite().all())


def test_factors_stay_within_the_clamp_and_those_held_back_are_told() -> None:
    weight, removed = problem()
    removed[7, 1:] = True  # a row of which hardly anything is left
    wanted = VarianceMatching(name="variance_matching", clamp=(0.9, 1.2))
    result = compensated(weight, of_mask(weight, removed), wanted, torch.randn(64, 30))
    factors = (result.weight / weight)[~removed]
    assert float(factors.max()) <= 1.2 + 1e-6
    assert float(factors.min()) >= 0.9 - 1e-6
    assert any(told.startswith("factors_clamped:") for told in result.fallbacks)


def test_variance_matching_gives_each_row_the_second_moment_of_its_output() -> None:
    weight, removed = problem()
    inputs = torch.randn(500, 30) + 0.5
    result = compensated(weight, of_mask(weight, removed), VarianceMatching(name="variance_matching", clamp=WIDE), inputs)
    before, after = inputs @ weight.T, inputs @ result.weight.T
    torch.testing.assert_close(after.square().mean(dim=0), before.square().mean(dim=0), rtol=1e-4, atol=0)
    expected = (before - after).square().sum() / before.square().sum()
    assert result.error == pytest.approx(float(expected), rel=1e-4)
    assert result.error_measure == "sample"


def test_no_factor_has_a_smaller_squared_error_than_that_of_least_squares() -> None:
    weight, removed = problem()
    inputs = torch.randn(500, 30) + 0.5
    before, after = inputs @ weight.T, inputs @ weight.masked_fill(removed, 0.0).T
    best = least_squares_factors(output_moments(weight, weight.masked_fill(removed, 0.0), inputs)).float()

    def errors(factors: Tensor) -> Tensor:
        return (before - after * factors).square().sum(dim=0)

    for step in (-0.05, 0.05):
        assert bool((errors(best) < errors(best + step)).all())


def test_moments_are_sums_over_the_tokens_however_many_there_are() -> None:
    weight, removed = problem()
    pruned, inputs = weight.masked_fill(removed, 0.0), torch.randn(2500, 30)
    found = output_moments(weight, pruned, inputs)
    before, after = inputs.double() @ weight.double().T, inputs.double() @ pruned.double().T
    torch.testing.assert_close(found.dense, before.square().mean(dim=0), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.product, (before * after).mean(dim=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.pruned, after.square().mean(dim=0), rtol=1e-5, atol=0)


def test_a_row_without_output_is_left_alone() -> None:
    weight, removed = problem()
    removed[2] = True
    found = output_moments(weight, weight.masked_fill(removed, 0.0), torch.randn(40, 30))
    assert float(matching_factors(found)[2]) == float(least_squares_factors(found)[2]) == 1.0


def test_the_sample_is_seeded_and_does_not_depend_on_how_tokens_come() -> None:
    chosen = chosen_tokens(1000, 0.125, seed=3)
    assert int(chosen.sum()) == 125
    assert torch.equal(chosen, chosen_tokens(1000, 0.125, seed=3))
    assert not torch.equal(chosen, chosen_tokens(1000, 0.125, seed=4))
    inputs = torch.randn(10, 100, 4)
    whole, parts = InputSample(chosen), InputSample(chosen)
    whole.add(inputs)
    for part in torch.split(inputs, 3):
        parts.add(part)
    assert torch.equal(whole.inputs, inputs.flatten(0, 1)[chosen])
    assert torch.equal(whole.inputs, parts.inputs)


def calibration_tokens(model: Path) -> Tensor:
    """Those of `recipe`, (6, 32)."""
    text = read_text("wikitext2-sample", "calibration")[:40_000]
    return calibration_set(tokenise(model, text, 300), recipe().calibration).tokens


def first_output(folder: Path, tokens: Tensor) -> Tensor:
    """What the first linear makes of the first block's input, (batch, seq, out_features)."""
    model, seen = LlamaForCausalLM.from_pretrained(folder), list[Tensor]()
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    model(tokens)
    return seen[0]


def test_energy_compensation_of_magnitude_needs_no_data(llama: Path, tmp_path: Path) -> None:
    wanted = recipe({"name": "magnitude", "compensation": {"name": "energy", "guard": False}})
    report = prune(wanted, llama, tmp_path).report
    assert "calibration" not in report
    with checkpoint(tmp_path / "output") as written, checkpoint(llama) as source:
        name = "model.layers.1.mlp.up_proj.weight"
        weight, dense = written.read(name), source.read(name)
    removed = weight == 0
    expected = energy(dense, removed)
    torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("name", ["sparsegpt", "alps"])
def test_compensation_of_updated_weights_has_to_be_asked_for(name: str) -> None:
    wanted: dict[str, Any] = {"name": name, "compensation": {"name": "variance_matching"}}
    with pytest.raises(ValidationError, match="on_updated_weights"):
        recipe(wanted)
    wanted["compensation"] = {"name": "variance_matching", "on_updated_weights": True}
    assert recipe(wanted).method.guarded


@pytest.mark.parametrize("compensation", ["energy", "variance_matching", "least_squares"])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "ria", "dsnot", "sparsegpt", "alps"])
def test_after_any_method_weights_that_stay_change_and_the_mask_does_not(
    llama: Path, tmp_path: Path, name: str, compensation: str
) -> None:
    wanted: dict[str, Any] = {"name": compensation, "guard": False, "on_updated_weights": name in {"sparsegpt", "alps"}}
    block = (
        "model.layers.0.self_attn.k_proj.weight"  # of the first group: pruned on the same inputs, whatever came of others
    )
    weights: list[Tensor] = []
    for method in ({"name": name}, {"name": name, "compensation": wanted}):
        folder = tmp_path / str(len(weights))
        prune(recipe(method, "4:8"), llama, folder)
        with checkpoint(folder / "output") as written:
            weights.append(written.read(block))
    plain, changed = weights
    assert torch.equal(plain == 0, changed == 0)
    assert not torch.allclose(plain, changed, rtol=1e-3)


def test_mean_correction_gives_a_llama_biases_and_says_so_in_its_config(llama: Path, tmp_path: Path) -> None:
    method = {"name": "wanda", "compensation": {"name": "mean_correction", "guard": False}}
    report = prune(recipe(method, 0.6, propagate="none"), llama, tmp_path).report
    config = json.loads((tmp_path / "output" / "config.json").read_text())
    assert (config["attention_bias"], config["mlp_bias"]) == (True, True)
    tokens = calibration_tokens(llama)
    corrected, before = (first_output(folder, tokens) for folder in (tmp_path / "output", llama))
    torch.testing.assert_close(corrected.mean(dim=(0, 1)), before.mean(dim=(0, 1)), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(corrected, before, rtol=1e-2)
    assert all(not linear["fallbacks"] for block in report["blocks"] for linear in block["linears"])


@pytest.mark.parametrize("architecture", sorted(name for name, family in FAMILIES.items() if family.bias_switches))
def test_every_bias_that_a_config_can_switch_on_is_one_that_transformers_reads(
    make_model: MakeModel, tmp_path: Path, architecture: str
) -> None:
    method = {"name": "wanda", "compensation": {"name": "mean_correction", "guard": False}}
    prune(recipe(method, 0.6), make_model(architecture), tmp_path)
    model, loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "output", output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    switched = [module for _, modules in FAMILIES[architecture].bias_switches for module in modules]
    corrected = {
        module
        for module in switched
        for name, bias in model.named_parameters()
        if name.endswith(f".{module}.bias") and bool(bias.any())
    }
    assert corrected
    assert corrected == {each for each in switched if any(f".{each}.weight" in name for name, _ in model.named_parameters())}


def test_a_linear_that_cannot_have_a_bias_is_named(make_model: MakeModel, tmp_path: Path) -> None:
    method = {"name": "wanda", "compensation": {"name": "mean_correction"}}
    report = prune(recipe(method), make_model("Qwen2ForCausalLM"), tmp_path).report
    refused = [
        linear["name"].split(".")[-2]
        for linear in report["blocks"][0]["linears"]
        if list(linear["fallbacks"]) == ["compensation_refused:mean_correction:no_bias"]
    ]
    assert refused == ["o_proj", "gate_proj", "up_proj", "down_proj"]


def test_a_model_that_can_have_no_bias_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    method = {"name": "wanda", "compensation": {"name": "mean_correction"}}
    with pytest.raises(ProblemError, match="No linear of a MistralForCausalLM") as raised:
        prune(recipe(method), make_model("MistralForCausalLM"), tmp_path)
    assert raised.value.code == "compensation_unavailable"
