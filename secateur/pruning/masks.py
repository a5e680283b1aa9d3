"""Which weights go: masks over matrices of scores. True is removed; counts are exact; of ties the first goes."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from secateur.pruning.allocation import Target
from secateur.pruning.lanes import lanes

Comparison = Literal["row", "layer"]


def removal_mask(scores: Tensor, target: Target, comparison: Comparison) -> Tensor:
    """The mask that `target` asks for, lowest scores removed. `scores` and the mask are (out_features, in_features).

    Unstructured: floor(elements x fraction) of the layer, or as many in rows that all remove the same number, but for the
    first ones, which remove one more if the rows do not divide the count. N:M: M - N of each M consecutive inputs of a row,
    whatever the comparison.
    """
    if target.group is None and comparison == "layer":
        return lowest_per_layer(scores, target.count(scores.numel()))
    parts, start = [], 0
    for rows, count in removed_per_row(target, scores.shape):
        parts.append(removal_mask_of_rows(scores[start : start + rows], count, target.group))
        start += rows
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # (out_features, in_features)


def removed_per_row(target: Target, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """How many weights go from each row of (out_features, in_features), as (rows, weights) from the first row on."""
    if target.group:
        kept, group = target.group
        return [(shape[0], shape[1] // group * (group - kept))]
    each, more = divmod(target.count(shape[0] * shape[1]), shape[0])
    return [(rows, count) for rows, count in ((more, each + 1), (shape[0] - more, each)) if rows]


def removal_mask_of_rows(scores: Tensor, count: int, group: tuple[int, int] | None) -> Tensor:
    """The mask that removes `count` from each row or, with a `group`, what N:M removes. (rows, in_features) both."""
    return n_of_m(scores, *group) if group else lowest_per_row(scores, count)


def lowest_per_row(scores: Tensor, count: int) -> Tensor:
    """Mark exactly the `count` lowest of each row, by (score, index). `scores` and the result are (rows, columns)."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = kth_lowest(scores, count)  # (rows, 1)
    chosen = scores <= threshold
    if int(chosen.count_nonzero()) == count * len(scores):  # no row can have fewer, so none has more
        return chosen
    below, ties = scores < threshold, scores == threshold
    wanted = count - below.sum(dim=1, keepdim=True)  # (rows, 1)
    return below | (ties & (ties.cumsum(dim=1) <= wanted))


def lowest_per_layer(scores: Tensor, count: int) -> Tensor:
    """Mark exactly the `count` lowest of the whole matrix, by (score, row-major index). (rows, columns) both."""
    return lowest_per_row(scores.reshape(1, -1), count).reshape(scores.shape)  # (rows, columns)


def kth_lowest(scores: Tensor, count: int) -> Tensor:
    """The `count`-th lowest score of each row of (rows, columns), counted from one: (rows, 1).

    On the CPU numpy's vectorised selection is several times as fast as torch's.
    """
    if scores.device.type != "cpu":
        return scores.kthvalue(count, dim=1, keepdim=True).values

    def of_rows(rows: Tensor) -> Tensor:
        return torch.from_numpy(np.partition(rows.numpy(), count - 1, axis=1)[:, count - 1 : count].copy())

    side_by_side = lanes(scores.device)
    return torch.cat(side_by_side.map(of_rows, scores.tensor_split(min(side_by_side.count, len(scores)))))  # (rows, 1)


def n_of_m(scores: Tensor, kept: int, group: int) -> Tensor:
    """Mark the `group` - `kept` lowest of each `group` consecutive columns, by (score, index).

    `scores` and the result are (rows, columns); `group` divides columns. A score's rank is the number of scores in its
    group that come before it: no sorting. Members of a group that lie apart are compared five times as fast.
    """
    members = scores.view(len(scores), -1, group).permute(2, 0, 1).contiguous()  # (group, rows, columns / group)
    rank = torch.zeros(members.shape, dtype=torch.int8, device=scores.device)
    for place in range(1, group):
        before = members[:place] <= members[place]  # (place, rows, columns / group)
        rank[place] += before.sum(dim=0, dtype=torch.int8)
        rank[:place] += ~before
    return (rank < group - kept).permute(1, 2, 0).reshape(scores.shape)  # (rows, columns)
