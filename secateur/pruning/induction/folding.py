"""Scales of pairs, multiplied into a block's weights: its function stays, they change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from secateur.pruning.induction.heads import NOWHERE, Places
from secateur.pruning.induction.pairs import Pair, Side


def spread(side: Side, free: Tensor, neutral: float = 1.0) -> Tensor:
    """What each channel along `side` has: (pair.free,) to (channels,). `neutral`: of channels that have no
    scale: 1 if `free` are scales, 0 if they are shifts."""
    places, whole = _places(side.places, free.device)
    known = free if whole else torch.cat([free, free.new_tensor([neutral])])  # NOWHERE is the last
    return known[places]  # (channels,)


@lru_cache(maxsize=256)
def _places(places: Places, device: torch.device) -> tuple[Tensor, bool]:
    """`places` as an index, NOWHERE as the one behind the last, and whether none is NOWHERE."""
    index = torch.tensor(places, device=device)  # (channels,)
    return index, NOWHERE not in places


def fold(
    tensors: Mapping[str, Tensor],
    pairs: Iterable[Pair],
    scales: Mapping[str, Tensor],
    shifts: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """A block's `tensors`, by their names below the block that runs, with `scales` and `shifts` moved into them.

    `scales`: s > 0 by a pair's name, (free,): columns are multiplied by it and what makes their input is divided (equation 3
    of arXiv 2602.21652); for q_k queries are multiplied and keys divided. `shifts`: delta likewise, of the input as it was:
    the producer's bias loses it, the consumers' gain W delta. Pairs with neither stay as they are.

    Names, shapes and dtypes stay; computed is in float32, or float64 for tensors that are. `tensors` are left alone. Raises
    ValueError for a shift of a pair that carries none.
    """
    moved = [pair for pair in pairs if pair.name in scales or pair.name in (shifts or {})]
    modules = {side.module for pair in moved for side in pair.sides}
    wide = {
        name: tensor if tensor.dtype == torch.float64 else tensor.float()
        for name, tensor in tensors.items()
        if name.rpartition(".")[0] in modules
    }
    for pair in moved:
        if shifts and pair.name in shifts:
            if not pair.shifts:
                raise ValueError(f"the pair {pair.name} cannot carry a shift")
            for side in pair.sides:
                _shift(wide, side, shifts[pair.name])
        if pair.name in scales:
            for side in pair.sides:
                _scale(wide, side, scales[pair.name])
    return {name: wide.get(name, tensor).to(tensor.dtype) for name, tensor in tensors.items()}


def _scale(wide: dict[str, Tensor], side: Side, scale: Tensor) -> None:
    """Multiply or divide what is at `side`, replacing it in `wide`."""
    weight, bias = f"{side.module}.weight", f"{side.module}.bias"
    each = spread(side, scale.to(wide[weight]))  # (channels,)
    factors = 1 / each if side.inverse else each
    if side.axis == "gain":
        wide[weight] = (side.added + wide[weight]) * factors - side.added
    else:
        down = (side.axis == "rows") != side.transposed
        wide[weight] = wide[weight] * (factors[:, None] if down else factors)
    if side.axis != "columns" and bias in wide:
        wide[bias] = wide[bias] * factors


def _shift(wide: dict[str, Tensor], side: Side, shift: Tensor) -> None:
    """Take the shift from what makes the input, and give the biases of what takes it what it would have made of it."""
    weight, bias = wide[f"{side.module}.weight"], f"{side.module}.bias"
    each = spread(side, shift.to(weight), neutral=0.0)  # (channels,)
    if side.axis == "columns":
        wide[bias] = wide[bias] + (each @ weight if side.transposed else weight @ each)
    else:
        wide[bias] = wide[bias] - each
