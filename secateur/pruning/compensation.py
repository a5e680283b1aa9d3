"""Compensation of what a mask removed, in closed form, after any criterion: weights that stay change, the mask never.

Every function takes the dense weight W and the pruned weight W' as matrices of (out_features, in_features). All of this is
ours and looks at some inputs; the paper's energy compensation, which looks at weights alone, is in `energy.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.pruning.methods import Pruned
from secateur.pruning.products import linear
from secateur.pruning.statistics import TOKENS_AT_ONCE
from secateur.recipes import Correction, LeastSquares, VarianceMatching


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
        before, after = linear(weight, tokens).float(), linear(pruned, tokens).float()  # (out_features, tokens)
        sums[0] += torch.linalg.vector_norm(before, dim=1).square()
        sums[2] += torch.linalg.vector_norm(after, dim=1).square()
        sums[1] += before.mul_(after).sum(dim=1)
    return OutputMoments(*(sums / max(len(inputs), 1)))


def matching_factors(moments: OutputMoments) -> Tensor:
    """For each row the factor that gives y' the second moment of y: sqrt(E y^2 / E y'^2), (out_features,)."""
    return ratio(moments.dense, moments.pruned).sqrt()


def least_squares_factors(moments: OutputMoments) -> Tensor:
    """For each row the factor with the least E (y - s y')^2: E y y' / E y'^2, (out_features,)."""
    return ratio(moments.product, moments.pruned)


def mean_correction(weight: Tensor, pruned: Tensor, mean: Tensor) -> Tensor:
    """The bias that gives the pruned linear the mean output of the dense one: (W - W') E x, (out_features,), float64."""
    return (weight.double() - pruned.double()) @ mean.double()


def compensated(weight: Tensor, pruned: Pruned, wanted: Correction, inputs: Tensor | None) -> Pruned:
    """What `wanted`, a scaling of rows, makes of a pruned linear. `inputs`: some of its inputs, (tokens, in_features).

    The error is measured anew on `inputs`. How many factors the clamp held back is told.
    """
    assert isinstance(wanted, VarianceMatching | LeastSquares), "there is no other"  # noqa: S101 - for the type checker
    assert inputs is not None, "these are given a sample"  # noqa: S101 - for the type checker
    moments = output_moments(weight, pruned.weight, inputs)
    factors = (matching_factors if isinstance(wanted, VarianceMatching) else least_squares_factors)(moments)
    held = factors.clamp(*wanted.clamp)  # (out_features,)
    scaled = torch.mul(pruned.weight, held.float().unsqueeze(1), out=torch.empty_like(weight))  # (out_features, in_features)
    result = scaled.add_(0.0)  # what underflows is +0.0, like all that is removed
    lost = moments.dense - 2 * held * moments.product + held.square() * moments.pruned  # (out_features,)
    return replace(
        pruned,
        weight=result,
        error=share(float(lost.sum()), float(moments.dense.sum())),
        error_measure="sample",
        fallbacks=(*pruned.fallbacks, *factors_clamped((factors != held).sum())),
    )


def mean_corrected(weight: Tensor, pruned: Pruned, mean: Tensor, bias: Tensor | None) -> Pruned:
    """The pruned linear with the mean output of the dense one: (W - W') E x is added to its `bias`, (out_features,), if it
    can have one. `mean`: the mean input E x, (in_features,)."""
    if bias is None:
        return replace(pruned, fallbacks=(*pruned.fallbacks, "compensation_refused:mean_correction:no_bias"))
    lost = mean_correction(weight, pruned.weight, mean)
    return replace(pruned, bias=(bias.double() + lost).to(bias.dtype))


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; one where the denominator is zero: what is not there cannot be scaled."""
    return torch.where(denominator > 0, numerator / denominator.clamp_min(torch.finfo(denominator.dtype).tiny), 1.0)


def factors_clamped(count: Tensor) -> list[str]:
    """The fallback that says how many factors a clamp held back; none if it held none."""
    return [f"factors_clamped:{int(count)}"] if count else []


def share(part: float, whole: float) -> float:
    """What `part` is of `whole`; zero of nothing."""
    return max(0.0, part / whole) if whole > 0 else 0.0
