"""Energy compensation against the paper's equations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from secateur.pruning.energy import _line, energy_compensated
from secateur.pruning.lanes import Lanes
from secateur.recipes import EnergyCompensation
from tests.engine.masked import WIDE, energy, of_mask, problem
from tests.engine.runs import checkpoint, prune, recipe


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


@pytest.mark.parametrize("rows", [7, 3])  # of a part: few parts, and as many as lanes take
def test_energy_compensation_of_many_parts_is_that_of_the_whole(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, removed = problem(out_features=101)
    whole = energy(weight, removed)
    monkeypatch.setattr("secateur.pruning.energy.MOST_ELEMENTS", rows * weight.shape[1])
    monkeypatch.setattr("secateur.pruning.lanes._lanes", lambda *_: Lanes(2, 2))
    made = energy_compensated(weight, of_mask(weight, removed), EnergyCompensation(name="energy"))
    torch.testing.assert_close(made.weight, whole)
    error = (weight - whole).square().sum() / weight.square().sum()
    assert made.error == pytest.approx(float(error), rel=1e-5)
    assert made.error_measure == "weights"


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
