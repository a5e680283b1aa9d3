"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from torch import Tensor

from secateur.pruning.masks import removal_mask
from secateur.pruning.methods import Pruned, relative_error, without
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

    def prune(self, weight: Tensor, prepared: None) -> Pruned:  # noqa: ARG002 - the protocol of every method
        removed = removal_mask(magnitude_scores(weight), self._sparsity, self._comparison)
        pruned = without(weight, removed)
        return Pruned(pruned, removed, relative_error(weight, pruned, None), "weights")
