"""Which weights go: masks over matrices of scores. True is removed; counts are exact; of ties the first goes."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from secateur.recipes import Sparsity

Comparison = Literal["row", "layer"]


def removal_mask(scores: Tensor, sparsity: Sparsity, comparison: Comparison) -> Tensor:
    """The mask that `sparsity` asks for, lowest scores removed. `scores` and the mask are (out_features, in_features).

    Unstructured: floor(in_features x target) of each row, or floor(elements x target) of the layer. N:M: M - N of each
    M consecutive inputs of a row, whatever the comparison.
    """
    if sparsity.group:
        return n_of_m(scores, *sparsity.group)
    if comparison == "row":
        return lowest_per_row(scores, count_of(scores.shape[1], sparsity.target))
    return lowest_per_layer(scores, count_of(scores.numel(), sparsity.target))


def count_of(total: int, fraction: float) -> int:
    """floor(total x fraction), where `fraction` is the decimal number that it is written as: 0.3 x 10 is 3."""
    return math.floor(Fraction(str(fraction)) * total)


def lowest_per_row(scores: Tensor, count: int) -> Tensor:
    """Mark exactly the `count` lowest of each row, by (score, index). `scores` and the result are (rows, columns)."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = _kth_lowest(scores, count)  # (rows, 1)
    chosen = scores <= threshold
    if int(chosen.count_nonzero()) == count * len(scores):  # no row can have fewer, so none has more
        return chosen
    below, ties = scores < threshold, scores == threshold
    wanted = count - below.sum(dim=1, keepdim=True)  # (rows, 1)
    return below | (ties & (ties.cumsum(dim=1) <= wanted))


def lowest_per_layer(scores: Tensor, count: int) -> Tensor:
    """Mark exactly the `count` lowest of the whole matrix, by (score, row-major index). (rows, columns) both."""
    return lowest_per_row(scores.reshape(1, -1), count).reshape(scores.shape)  # (rows, columns)


def _kth_lowest(scores: Tensor, count: int) -> Tensor:
    """The `count`-th lowest score of each row of (rows, columns), counted from one: (rows, 1).

    On the CPU numpy's vectorised selection is several times as fast as torch's.
    """
    if scores.device.type != "cpu":
        return scores.kthvalue(count, dim=1, keepdim=True).values
    return torch.from_numpy(np.partition(scores.numpy(), count - 1, axis=1)[:, count - 1 : count].copy())


def n_of_m(scores: Tensor, kept: int, group: int) -> Tensor:
    """Mark the `group` - `kept` lowest of each `group` consecutive columns, by (score, index).

    `scores` and the result are (rows, columns); `group` divides columns. A score's rank is the number of scores in its
    group that come before it: no sorting.
    """
    grouped = scores.view(len(scores), -1, group)  # (rows, columns / group, group)
    position = torch.arange(group, device=scores.device)
    rank = torch.zeros_like(grouped, dtype=torch.int8)
    for j in range(group):
        other = grouped[..., j : j + 1]  # (rows, columns / group, 1)
        rank += (other < grouped) | ((other == grouped) & (j < position))
    return (rank < group - kept).flatten(1)  # (rows, columns)
