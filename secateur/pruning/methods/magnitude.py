"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from secateur.pruning.allocation import Target
from secateur.pruning.masks import removal_mask
from secateur.pruning.methods import Pruned, lost_share, without
from secateur.pruning.statistics import Statistics
from secateur.recipes import Magnitude


def magnitude_scores(weight: Tensor) -> Tensor:
    """|W|, (out_features, in_features), in float32."""
    return weight.float().abs()


class MagnitudeMethod:
    def __init__(self, parameters: Magnitude) -> None:
        self._comparison = parameters.comparison

    def prepare(self, statistics: Statistics | None) -> None:
        """Linears share nothing: the inputs are not looked at."""

    def prune(self, weights: Sequence[Tensor], targets: Sequence[Target], prepared: None) -> list[Pruned]:  # noqa: ARG002 - the protocol of every method
        return [self._prune(weight, target) for weight, target in zip(weights, targets, strict=True)]

    def _prune(self, weight: Tensor, target: Target) -> Pruned:
        scores = magnitude_scores(weight)
        removed = removal_mask(scores, target, self._comparison)
        return Pruned(without(weight, removed), removed, lost_share(scores, removed), "weights")
