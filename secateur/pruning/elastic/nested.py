"""Nested masks: one sort of a linear's importance, from which every rate's mask is a comparison."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def removal_ranks(scores: Tensor) -> Tensor:
    """The place of each weight in the order of its row's removal, by (score, index): int16, or int32 for wide rows.

    `scores`: not negative, float32, (out_features, in_features), as is the result. At any rate the weights whose rank is
    below the rate's count are those that `masks.lowest_per_row` marks, so a higher rate's mask contains a lower one's.
    """
    columns = scores.shape[1]
    # The bits of floats that are not negative order as the floats do; with the index below them no two keys are equal.
    bits = (scores + 0.0).contiguous().view(torch.int32).long()
    keys = (bits << 32) | torch.arange(columns, device=scores.device)
    order = _sorted(keys) & 0xFFFFFFFF  # (out_features, in_features)
    dtype = torch.int16 if columns <= torch.iinfo(torch.int16).max else torch.int32
    places = torch.arange(columns, dtype=dtype, device=scores.device).expand_as(order)
    return torch.empty_like(order, dtype=dtype).scatter_(1, order, places)


def _sorted(keys: Tensor) -> Tensor:
    """Each row of (rows, columns) sorted; on the CPU numpy's vectorised sort is ten times as fast as torch's."""
    if keys.device.type != "cpu":
        return keys.sort(dim=1).values
    return torch.from_numpy(np.sort(keys.numpy(), axis=1))


def kept_bits(ranks: Tensor, count: int, like: torch.dtype) -> Tensor:
    """All ones where a weight stays and zero where its rank is below `count`, in integers of `like`'s size.

    `ranks` and the result are (out_features, in_features). Made by arithmetic: comparing and converting takes three times
    as long, and training does it for every linear, band and step.
    """
    return ((count - 1) - ranks >> (8 * ranks.element_size() - 1)).to(like)
