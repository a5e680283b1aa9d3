"""Compensation by factors of rows: its closed forms, and that it may follow any method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from secateur.pruning.compensation import (
    compensated,
    least_squares_factors,
    matching_factors,
    output_moments,
)
from secateur.pruning.statistics import InputSample, chosen_tokens
from secateur.recipes import LeastSquares, VarianceMatching
from tests.engine.masked import WIDE, energy, of_mask, problem
from tests.engine.runs import checkpoint, prune, recipe


def by_name(name: str, weight: Tensor, removed: Tensor, inputs: Tensor) -> Tensor:
    if name == "energy":
        return energy(weight, removed)
    kinds: dict[str, Any] = {"variance_matching": VarianceMatching, "least_squares": LeastSquares}
    return compensated(weight, of_mask(weight, removed), kinds[name](name=name), inputs).weight


@pytest.mark.parametrize("mean", [0.3, 100.0])
@pytest.mark.parametrize("name", ["energy", "variance_matching"])
def test_where_nothing_is_removed_nothing_changes(name: str, mean: float) -> None:
    weight, _ = problem(mean=mean)
    result = by_name(name, weight, torch.zeros_like(weight, dtype=torch.bool), torch.randn(50, 30))
    torch.testing.assert_close(result, weight, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("turned", [False, True])  # as GPT-2 keeps its weights
def test_energy_compensation_leaves_what_nothing_is_removed_from_bit_for_bit(turned: bool) -> None:
    weight, _ = problem(out_features=80)
    weight[3, 4] = 0.0
    weight = weight.T.contiguous().T if turned else weight  # (80, 30)
    torch.testing.assert_close(energy(weight, torch.zeros_like(weight, dtype=torch.bool)), weight, rtol=0, atol=0)


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
