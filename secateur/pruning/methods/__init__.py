"""The methods: in each file pure functions on tensors first, and below them the thin class that the pipeline drives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from secateur.pruning.statistics import Statistics


@dataclass(frozen=True, slots=True)
class Pruned:
    """What became of one linear.

    `weight`: (out_features, in_features), in the dtype it came in. `removed`: the mask, same shape, True where a weight was
    removed. `error`: squared output error relative to the squared output, as `error_measure` estimates it. `fallbacks`:
    what had to be done numerically beyond the method's text.
    """

    weight: Tensor
    removed: Tensor
    error: float
    error_measure: str
    fallbacks: tuple[str, ...] = ()


class Method(Protocol):
    """A method as the pipeline drives it, one group of linears with the same input after the other."""

    def prepare(self, statistics: Statistics | None) -> Any:
        """What linears with the same input share; computed once for them."""

    def prune(self, weight: Tensor, prepared: Any) -> Pruned:
        """Prune `weight`, (out_features, in_features). The tensor that is given is not changed."""


def without(weight: Tensor, removed: Tensor) -> Tensor:
    """`weight` with +0.0 where `removed`, and no -0.0 anywhere. All (out_features, in_features)."""
    return weight.masked_fill(removed, 0.0) + 0.0


def relative_error(weight: Tensor, pruned: Tensor, squares: Tensor | None) -> float:
    """sum (W - W')^2 s / sum W^2 s, where s is `squares`, (in_features,), or ones.

    With s the inputs' sums of squares this is the relative squared error of the output if inputs were uncorrelated.
    `weight` and `pruned`: (out_features, in_features).
    """
    wide = weight.float()
    lost, whole = (wide - pruned.float()).square().sum(dim=0).double(), wide.square().sum(dim=0).double()  # (in_features,)
    scale = 1.0 if squares is None else squares.double()
    denominator = float((whole * scale).sum())
    return float((lost * scale).sum()) / denominator if denominator > 0 else 0.0
