"""Compensation of what a mask removed, in closed form, after any criterion: weights that stay change, the mask never.

Every function takes the dense weight W and the pruned weight W' as matrices of (out_features, in_features). Energy
compensation is the paper's (arXiv 2602.07375) and looks at the weights alone; the others are ours and look at some inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.pruning.methods import Pruned
from secateur.pruning.statistics import TOKENS_AT_ONCE
from secateur.recipes import Clamp, Correction, EnergyCompensation, LeastSquares, VarianceMatching


def energy_compensated(weight: Tensor, pruned: Tensor, removed: Tensor, epsilon: float, clamp: Clamp) -> Tensor:
    """W' with the spread of each column, then of each row, brought back to that of W, in float32 (the paper's stage 2).

    With m the mean of a column of W, E = sum (W - m)^2 and E' = sum (W' - m)^2 over the whole column, removed weights
    included, what stays becomes (W' - m) sqrt(E / (E' + epsilon E)) + m; then the same for rows, of what the column step
    gave. Means and E are those of W in both steps. The factors are held within `clamp`. `removed`: True where a weight is
    gone, and stays so. That epsilon is relative to E is ours: the result does not depend on the weights' scale.
    """
    dense, result, kept = weight.float(), pruned.float(), 1.0 - removed.float()
    for axis in (0, 1):
        center = dense.mean(dim=axis, keepdim=True)  # (1, in_features), then (out_features, 1)
        energy = (dense - center).square_().sum(dim=axis, keepdim=True)
        result -= center
        left = result.square().sum(dim=axis, keepdim=True)
        factors = _ratio(energy, left + epsilon * energy).sqrt().clamp(*clamp)
        result.mul_(factors).add_(center).mul_(kept)
    return result


@dataclass(frozen=True, slots=True)
class OutputMoments:
    """Means over some inputs x of the squares of the outputs y = W x and y' = W' x and of their product, row by row.

    All (out_features,), float64.
    """

    dense: Tensor
    product: Tensor
    pruned: Tensor


def output_moments(weight: Tensor, pruned: Tensor, inputs: Tensor) -> OutputMoments:
    """The moments of both outputs on `inputs`, (tokens, in_features). No Gram matrix: two products with the weights.

    Outputs are rounded as the model rounds them, sums are in float32, those of a thousand tokens each added up in float64.
    """
    sums = torch.zeros(3, len(weight), dtype=torch.float64, device=weight.device)  # (3, out_features)
    for tokens in torch.split(inputs, TOKENS_AT_ONCE):  # (tokens, in_features)
        before, after = (weight @ tokens.T).float(), (pruned @ tokens.T).float()  # (out_features, tokens)
        sums[0] += torch.linalg.vector_norm(before, dim=1).square()
        sums[2] += torch.linalg.vector_norm(after, dim=1).square()
        sums[1] += before.mul_(after).sum(dim=1)
    return OutputMoments(*(sums / max(len(inputs), 1)))


def matching_factors(moments: OutputMoments) -> Tensor:
    """For each row the factor that gives y' the second moment of y: sqrt(E y^2 / E y'^2), (out_features,)."""
    return _ratio(moments.dense, moments.pruned).sqrt()


def least_squares_factors(moments: OutputMoments) -> Tensor:
    """For each row the factor with the least E (y - s y')^2: E y y' / E y'^2, (out_features,)."""
    return _ratio(moments.product, moments.pruned)


def mean_correction(weight: Tensor, pruned: Tensor, mean: Tensor) -> Tensor:
    """The bias that gives the pruned linear the mean output of the dense one: (W - W') E x, (out_features,), float64."""
    return (weight.double() - pruned.double()) @ mean.double()


def compensated(weight: Tensor, pruned: Pruned, wanted: Correction, inputs: Tensor | None) -> Pruned:
    """What `wanted` makes of a pruned linear. `inputs`: some of its inputs, (tokens, in_features), where it wants any.

    The error is measured anew: on `inputs`, or, by compensation that has none, on the weights. How many factors the clamp
    held back is told.
    """
    if isinstance(wanted, EnergyCompensation):
        scaled = energy_compensated(weight, pruned.weight, pruned.removed, wanted.epsilon, wanted.clamp)
        result = scaled.to(weight.dtype) + 0.0
        dense = weight.float()
        error = _share(torch.linalg.vector_norm(dense - result).square(), torch.linalg.vector_norm(dense).square())
        return replace(pruned, weight=result, error=error, error_measure="weights")
    assert isinstance(wanted, VarianceMatching | LeastSquares), "there is no other"  # noqa: S101 - for the type checker
    assert inputs is not None, "these are given a sample"  # noqa: S101 - for the type checker
    moments = output_moments(weight, pruned.weight, inputs)
    factors = (matching_factors if isinstance(wanted, VarianceMatching) else least_squares_factors)(moments)
    held = factors.clamp(*wanted.clamp)  # (out_features,)
    scaled = torch.mul(pruned.weight, held.float().unsqueeze(1), out=torch.empty_like(weight))  # (out_features, in_features)
    result = scaled.add_(0.0)  # what underflows is +0.0, like all that is removed
    lost = moments.dense - 2 * held * moments.product + held.square() * moments.pruned  # (out_features,)
    clamped = int((factors != held).sum())
    return replace(
        pruned,
        weight=result,
        error=_share(lost.sum(), moments.dense.sum()),
        error_measure="sample",
        fallbacks=(*pruned.fallbacks, *([f"factors_clamped:{clamped}"] if clamped else [])),
    )


def _share(part: Tensor, whole: Tensor) -> float:
    return max(0.0, float(part) / float(whole)) if float(whole) > 0 else 0.0


def mean_corrected(weight: Tensor, pruned: Pruned, mean: Tensor, bias: Tensor | None) -> Pruned:
    """The pruned linear with the mean output of the dense one: (W - W') E x is added to its `bias`, (out_features,), if it
    can have one. `mean`: the mean input E x, (in_features,)."""
    if bias is None:
        return replace(pruned, fallbacks=(*pruned.fallbacks, "compensation_refused:mean_correction:no_bias"))
    lost = (weight.double() - pruned.weight.double()) @ mean.double()  # (out_features,)
    return replace(pruned, bias=(bias.double() + lost).to(bias.dtype))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; one where the denominator is zero: what is not there cannot be scaled."""
    return torch.where(denominator > 0, numerator / denominator.clamp_min(torch.finfo(denominator.dtype).tiny), 1.0)
