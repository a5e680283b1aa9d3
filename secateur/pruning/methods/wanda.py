"""Wanda (arXiv 2306.11695): weights go by |weight| x input norm, compared within each output row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.pruning.allocation import Target
from secateur.pruning.masks import removal_mask
from secateur.pruning.methods import Pruned, emphasised, lost_share, without
from secateur.pruning.methods.by_rows import pruned_by_rows
from secateur.pruning.statistics import Statistics
from secateur.recipes import Wanda


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """|W_ij| ||X_j||_2 (the paper's equation 1), float32.

    `weight`: (out_features, in_features); `norms`: each input's L2 norm over all tokens, (in_features,).
    """
    return weight.to(torch.float32, copy=True).abs_().mul_(norms.float())


class WandaMethod:
    def __init__(self, parameters: Wanda) -> None:
        self._comparison = parameters.comparison

    def prepare(self, statistics: Statistics | None) -> Tensor:
        """The inputs' norms, (in_features,)."""
        assert statistics is not None, "the registry says that Wanda observes norms"  # noqa: S101 - for the type checker
        return statistics.squares.sqrt()

    def prune(
        self, weights: Sequence[Tensor], targets: Sequence[Target], prepared: Tensor, emphasis: Tensor | None = None
    ) -> list[Pruned]:
        if self._comparison == "row":
            return pruned_by_rows(weights, targets, lambda rows: wanda_scores(rows, prepared), "diagonal", emphasis)
        return [self._prune(weight, target, prepared, emphasis) for weight, target in zip(weights, targets, strict=True)]

    def _prune(self, weight: Tensor, target: Target, norms: Tensor, emphasis: Tensor | None) -> Pruned:
        scores = wanda_scores(weight, norms)
        removed = removal_mask(emphasised(scores, emphasis), target, "layer")
        return Pruned(without(weight, removed), removed, lost_share(scores, removed), "diagonal")
