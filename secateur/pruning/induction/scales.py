"""What is learned: for some linears of a block a scale of each input, by its logarithm theta.

There are two things to do with it, and they have nothing in common but how it is learned:

the equivalent fold
    Columns are multiplied by the scale, and what makes the inputs is divided by it (the paper's equation 3). The function
    stays, weights change: what looks at weights alone, such as Magnitude, prunes others. See `pairs` and `folding`.
the multiplier of the score
    Weights stay, and so does the function: scores are multiplied by the scale (the paper's equation 11). For what looks at
    inputs as well as weights, such as Wanda, to which a fold makes no difference: what the weight gains the input loses.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.pruning.induction.pairs import Pair


@dataclass(frozen=True, slots=True)
class Scale:
    """`places`: by linear, for each of its columns which of theta's elements is its, (in_features,), int64. A fold may tie
    columns, and linears with the same input have it together. `free`: how many elements theta has."""

    name: str
    places: Mapping[str, Tensor]
    free: int

    @property
    def linears(self) -> tuple[str, ...]:
        """Whose columns it scales."""
        return tuple(self.places)

    def spread(self, theta: Tensor, linear: str) -> Tensor:
        """theta of each column: (free,) to (in_features,)."""
        return theta[self.places[linear]]  # (in_features,)

    def gathered(self, columns: Tensor, linear: str) -> Tensor:
        """The sum over the columns that share an element of theta: (in_features,) to (free,)."""
        return torch.zeros(self.free, dtype=columns.dtype, device=columns.device).index_add_(0, self.places[linear], columns)

    def centred(self, theta: Tensor) -> Tensor:
        """theta with a mean of zero: the geometric mean of the scales is one. (free,)."""
        return theta - theta.mean()


def multiplier(linears: Sequence[str], in_features: int, device: torch.device) -> Scale:
    """The scale of the scores of linears with the same input: each input has its own."""
    places = torch.arange(in_features, device=device)
    return Scale("+".join(linears), dict.fromkeys(linears, places), in_features)


def foldable(pair: Pair, linears: Collection[str], device: torch.device) -> Scale:
    """The scale of a pair, of those of its consumers that are `linears`, which are pruned."""
    sides = [side for side in pair.consumers if side.module in linears]
    return Scale(pair.name, {side.module: torch.tensor(side.places, device=device) for side in sides}, pair.free)
