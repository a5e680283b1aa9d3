"""Statistical Correction (arXiv 2602.07375): weights go by |weight| x a statistic of the input x a factor of their column.

Compensation, the paper's second stage, is a stage of its own after any method: see `compensation`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from secateur.pruning.allocation import Target
from secateur.pruning.masks import removal_mask
from secateur.pruning.methods import Pruned, lost_share, without
from secateur.pruning.methods.wanda import wanda_scores
from secateur.pruning.statistics import InputMoments, Statistics
from secateur.recipes import StatisticalCorrection


def column_factors(weight: Tensor, alpha: float, epsilon: float) -> Tensor:
    """(v_j / mean v + epsilon)^(-alpha/2) with v_j the variance of column j of `weight`, (in_features,), float32.

    The paper's factor is (v_j + epsilon)^(-alpha/2); dividing by the mean, which changes no ranking, makes epsilon
    independent of the weights' scale. Where no column varies at all (a linear with one row) every factor is the same.
    `weight`: (out_features, in_features).
    """
    variance = weight.float().var(dim=0, correction=0)  # (in_features,)
    return (variance / (variance.mean().item() or 1.0) + epsilon).pow(-alpha / 2)


class StatisticalCorrectionMethod:
    def __init__(self, parameters: StatisticalCorrection) -> None:
        assert parameters.alpha != "auto", "the pipeline makes one method of each alternative"  # noqa: S101 - for the type checker
        self._alpha, self._epsilon = parameters.alpha, parameters.epsilon
        self._variant, self._comparison = parameters.variant, parameters.comparison

    def prepare(self, statistics: Statistics | None) -> tuple[Tensor, Tensor]:
        """What multiplies |weight|, and the inputs' norms, which lost outputs are measured by; (in_features,) both."""
        assert isinstance(statistics, InputMoments), "the registry says that it observes moments"  # noqa: S101 - for the type checker
        norms = statistics.squares.sqrt()
        return (statistics.variance.pow(0.25) if self._variant == "paper" else norms), norms

    def prune(self, weights: Sequence[Tensor], targets: Sequence[Target], prepared: tuple[Tensor, Tensor]) -> list[Pruned]:
        return [self._prune(weight, target, *prepared) for weight, target in zip(weights, targets, strict=True)]

    def _prune(self, weight: Tensor, target: Target, statistic: Tensor, norms: Tensor) -> Pruned:
        factors = column_factors(weight, self._alpha, self._epsilon)
        removed = removal_mask(wanda_scores(weight, statistic * factors), target, self._comparison)
        return Pruned(without(weight, removed), removed, lost_share(wanda_scores(weight, norms), removed), "diagonal")
