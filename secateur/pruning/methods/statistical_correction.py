"""Statistical Correction (arXiv 2602.07375): weights go by |weight| x a statistic of the input x a factor of their column.

Compensation, the paper's second stage, is a stage of its own after any method: see `compensation`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from secateur.pruning.allocation import Target
from secateur.pruning.masks import removal_mask
from secateur.pruning.methods import Pruned, emphasised, lost_share, without
from secateur.pruning.methods.by_rows import pruned_by_rows
from secateur.pruning.methods.wanda import wanda_scores
from secateur.pruning.statistics import InputMoments, Statistics
from secateur.recipes import StatisticalCorrection


def column_factors(weight: Tensor, alpha: float, epsilon: float) -> Tensor:
    """(v_j / mean v + epsilon)^(-alpha/2) with v_j the variance of column j of `weight`, (in_features,), float32.

    The paper's factor is (v_j + epsilon)^(-alpha/2); dividing by the mean, which changes no ranking, makes epsilon
    independent of the weights' scale. Where no column varies at all (a linear with one row) every factor is the same.
    `weight`: (out_features, in_features).
    """
    wide = weight.float()
    variance = (wide - wide.mean(dim=0)).square_().mean(dim=0)  # (in_features,); torch's var takes five times as long
    return (variance / (variance.mean().item() or 1.0) + epsilon).pow(-alpha / 2)


class StatisticalCorrectionMethod:
    def __init__(self, parameters: StatisticalCorrection) -> None:
        assert parameters.alpha != "auto", "the pipeline makes one method of each alternative"  # noqa: S101 - for the type checker
        self._alpha, self._epsilon = parameters.alpha, parameters.epsilon
        self._comparison = parameters.comparison

    def prepare(self, statistics: Statistics | None) -> tuple[Tensor, Tensor]:
        """The inputs' norms, and what the score has in their place, (in_features,) both."""
        assert statistics is not None, "the registry says that it observes norms or moments"  # noqa: S101 - for the type checker
        norms = statistics.squares.sqrt()
        return norms, statistics.variance.pow(0.25) if isinstance(statistics, InputMoments) else norms

    def prune(
        self,
        weights: Sequence[Tensor],
        targets: Sequence[Target],
        prepared: tuple[Tensor, Tensor],
        emphasis: Tensor | None = None,
    ) -> list[Pruned]:
        return [self._prune(weight, target, *prepared, emphasis) for weight, target in zip(weights, targets, strict=True)]

    def _prune(self, weight: Tensor, target: Target, norms: Tensor, statistic: Tensor, emphasis: Tensor | None) -> Pruned:
        if self._alpha:
            emphasis = emphasised(column_factors(weight, self._alpha, self._epsilon), emphasis)  # (in_features,)
        if self._comparison == "row" and statistic is norms:
            return pruned_by_rows([weight], [target], lambda rows: wanda_scores(rows, norms), "diagonal", emphasis)[0]
        removed = removal_mask(emphasised(wanda_scores(weight, statistic), emphasis), target, self._comparison)
        return Pruned(without(weight, removed), removed, lost_share(wanda_scores(weight, norms), removed), "diagonal")
