"""Sparsity Induction: the refresh, the gradient through the mask, the spectral term, and where scales begin."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from secateur.pruning.allocation import Target
from secateur.pruning.compensation import mean_corrected
from secateur.pruning.induction.initial import initial_scales
from secateur.pruning.induction.relaxation import gradient, relax, sorted_columns
from secateur.pruning.induction.scales import Scale, multiplier
from secateur.pruning.induction.scores import log_scores
from secateur.pruning.induction.spectral import SpectralTerm, power_iteration
from secateur.pruning.lanes import lanes
from secateur.pruning.masks import removal_mask
from secateur.pruning.methods import Pruned
from secateur.pruning.methods.magnitude import magnitude_scores
from secateur.pruning.methods.wanda import wanda_scores
from secateur.pruning.registry import METHODS
from secateur.pruning.statistics import Gram, InputMoments
from secateur.recipes import SparsityInduction, Wanda
from tests.engine.layers import layer, observed
from tests.engine.runs import recipe

HALF, TWO_OF_FOUR = Target("linear", Fraction(1, 2)), Target("linear", Fraction(1, 2), (2, 4))


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
    card = METHODS[method]
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
