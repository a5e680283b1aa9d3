"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from secateur.pruning.masks import removal_mask
from secateur.pruning.methods import Pruned, lost_share, without
from secateur.pruning.statistics import Statistics
from secateur.recipes import Magnitude, Sparsity


def magnitude_scores(weight: Tensor) -> Tensor:
    """|W|, (out_features, in_features), in float32."""
    return weight.float().abs()


class MagnitudeMethod:
    def __init__(self, parameters: Magnitude, sparsity: Sparsity) -> None:
        self._comparison, self._sparsity = parameters.comparison, sparsity

    def prepare(self, statistics: Statistics | None) -> None:
        """Linears share nothing: the inputs are not looked at."""

    def prune(self, weights: Sequence[Tensor], prepared: None) -> list[Pruned]:  # noqa: ARG002 - the protocol of every method
        return [self._prune(weight) for weight in weights]

    def _prune(self, weight: Tensor) -> Pruned:
        scores = magnitude_scores(weight)
        removed = removal_mask(scores, self._sparsity, self._comparison)
        return Pruned(without(weight, removed), removed, lost_share(scores, removed), "weights")
