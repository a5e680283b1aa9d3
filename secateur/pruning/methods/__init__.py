"""The methods: in each file pure functions on tensors first, and below them the thin class that the pipeline drives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from secateur.pruning.allocation import Target
from secateur.pruning.statistics import Statistics

# Integers of a float's size, by bytes: to look at the bits.
BITS: Mapping[int, torch.dtype] = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Pruned:
    """What became of one linear.

    `weight`: (out_features, in_features), in the dtype it came in. `removed`: the mask, same shape, True where a weight was
    removed. `error`: squared output error relative to the squared output, as `error_measure` estimates it. `fallbacks`:
    what had to be done numerically beyond the method's text. `bias`: (out_features,), None where it is what it was.
    """

    weight: Tensor
    removed: Tensor
    error: float
    error_measure: str
    fallbacks: tuple[str, ...] = ()
    bias: Tensor | None = None


class Method(Protocol):
    """A method as the pipeline drives it, one group of linears with the same input after the other.

    It is made from its parameters in the recipe.
    """

    def prepare(self, statistics: Statistics | None) -> Any:
        """What linears with the same input share; computed once for them."""

    def prune(self, weights: Sequence[Tensor], targets: Sequence[Target], prepared: Any) -> list[Pruned]:
        """Prune the weights of a group, (out_features, in_features) each, as much as each one's target says.

        An N:M pattern is the same for the whole group. The tensors that are given are not changed.
        """


class ScoreMethod(Method, Protocol):
    """A method that weights go by the scores of, which can be multiplied."""

    def prune(
        self, weights: Sequence[Tensor], targets: Sequence[Target], prepared: Any, emphasis: Tensor | None = None
    ) -> list[Pruned]:
        """As `Method.prune`, with all scores of an input multiplied by its `emphasis`, (in_features,), if there is one."""


def emphasised(scores: Tensor, emphasis: Tensor | None) -> Tensor:
    """`scores`, (out_features, in_features), times `emphasis`, (in_features,), if there is any."""
    return scores if emphasis is None else scores * emphasis


def without(weight: Tensor, removed: Tensor) -> Tensor:
    """`weight` with +0.0 where `removed`, and no -0.0 anywhere. All (out_features, in_features).

    The zeros are made by clearing bits, which does not mind a random mask; torch's masked_fill takes nine times as long.
    """
    bits = BITS[weight.element_size()]
    kept = removed.to(bits) - 1  # all ones where a weight stays
    return (weight.contiguous().view(bits) & kept).view(weight.dtype) + 0.0


def lost_share(scores: Tensor, removed: Tensor) -> float:
    """Sum of the squares of the `scores` that are `removed`, relative to that of all. Both (out_features, in_features).

    With |weight| x input norm as score this is the relative squared error of the linear's output if its inputs were
    uncorrelated; with |weight|, the relative squared error of the weights.
    """
    everything, gone = scores.flatten(), (scores * removed).flatten()  # (out_features * in_features,)
    whole = float(torch.dot(everything, everything))
    return float(torch.dot(gone, gone)) / whole if whole > 0 else 0.0
