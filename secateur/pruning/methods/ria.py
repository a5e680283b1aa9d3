"""RIA (Zhang et al., ICLR 2024, OpenReview Tr0lPx9woF): weights go by their share of their row's and column's, times a power
of the input norm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from secateur.pruning.allocation import Target
from secateur.pruning.masks import removal_mask
from secateur.pruning.methods import Pruned, emphasised, lost_share, without
from secateur.pruning.methods.wanda import wanda_scores
from secateur.pruning.statistics import Statistics
from secateur.recipes import RIA


def relative_importance(weight: Tensor) -> Tensor:
    """|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|, (out_features, in_features), float32.

    A weight's share of its column (one input) and of its row (one output). Where all of a row or a column is zero, so is
    each weight's share of it.
    """
    size = weight.float().abs()
    columns, rows = size.sum(dim=0, keepdim=True), size.sum(dim=1, keepdim=True)  # (1, in_features), (out_features, 1)
    return size / columns.masked_fill(columns == 0, 1.0) + size / rows.masked_fill(rows == 0, 1.0)


def ria_scores(weight: Tensor, norms: Tensor, power: float) -> Tensor:
    """Relative importance times ||X_j||_2^power, (out_features, in_features), float32.

    `weight`: (out_features, in_features); `norms`: each input's L2 norm over all tokens, (in_features,).
    """
    return relative_importance(weight) * norms.pow(power).float()


class RIAMethod:
    def __init__(self, parameters: RIA) -> None:
        self._parameters = parameters

    def prepare(self, statistics: Statistics | None) -> Tensor:
        """The inputs' norms, (in_features,)."""
        assert statistics is not None, "the registry says that RIA observes norms"  # noqa: S101 - for the type checker
        return statistics.squares.sqrt()

    def prune(
        self, weights: Sequence[Tensor], targets: Sequence[Target], prepared: Tensor, emphasis: Tensor | None = None
    ) -> list[Pruned]:
        return [self._prune(weight, target, prepared, emphasis) for weight, target in zip(weights, targets, strict=True)]

    def _prune(self, weight: Tensor, target: Target, norms: Tensor, emphasis: Tensor | None) -> Pruned:
        scores = ria_scores(weight, norms, self._parameters.power)
        removed = removal_mask(emphasised(scores, emphasis), target, self._parameters.comparison)
        lost = lost_share(wanda_scores(weight, norms), removed)
        return Pruned(without(weight, removed), removed, lost, "diagonal")
