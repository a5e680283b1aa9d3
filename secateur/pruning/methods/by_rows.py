"""Scores that are compared within rows, some rows at a time: what is made of them stays in a core's cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.pruning.allocation import Target
from secateur.pruning.lanes import lanes
from secateur.pruning.masks import removal_mask_of_rows, removed_per_row
from secateur.pruning.methods import Pruned, emphasised, without

ELEMENTS_IN_CACHE = 1 << 17  # of scores, beside what they are made of and what is made of them


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some rows of a weight, (rows, in_features), of each of which `count` weights go."""

    weight: Tensor
    count: int


@dataclass(frozen=True, slots=True)
class _Done:
    weight: Tensor
    removed: Tensor
    lost: float
    whole: float


def pruned_by_rows(
    weights: Sequence[Tensor],
    targets: Sequence[Target],
    score: Callable[[Tensor], Tensor],
    error_measure: str,
    emphasis: Tensor | None = None,
) -> list[Pruned]:
    """Remove from each row of `weights`, (out_features, in_features) each, what scores lowest.

    `score` is given some rows of a weight and returns a new float32 tensor of their shape, whose squares add up to the
    error. `emphasis`: what scores are multiplied by before they are compared, (in_features,), but not in the error. The
    parts are shared among the cores.
    """
    parts = [list(_parts(weight, target)) for weight, target in zip(weights, targets, strict=True)]

    def prune(part: tuple[_Rows, Target]) -> _Done:
        rows, target = part
        scores = score(rows.weight)
        removed = removal_mask_of_rows(emphasised(scores, emphasis), rows.count, target.group)
        whole = float(torch.dot(scores.flatten(), scores.flatten()))
        lost = scores.mul_(removed).flatten()  # (rows * in_features,)
        return _Done(without(rows.weight, removed), removed, float(torch.dot(lost, lost)), whole)

    todo = [(rows, target) for of_weight, target in zip(parts, targets, strict=True) for rows in of_weight]
    done = iter(lanes(weights[0].device).map(prune, todo))
    return [_joined([next(done) for _ in of_weight], error_measure) for of_weight in parts]


def _parts(weight: Tensor, target: Target) -> Iterator[_Rows]:
    """All rows, in order; on a GPU as few parts as there can be."""
    size = max(1, ELEMENTS_IN_CACHE // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    start = 0
    for rows, count in removed_per_row(target, weight.shape):
        for part in torch.split(weight[start : start + rows], size):
            yield _Rows(part, count)
        start += rows


def _joined(parts: list[_Done], error_measure: str) -> Pruned:
    whole = sum(part.whole for part in parts)
    error = sum(part.lost for part in parts) / whole if whole > 0 else 0.0
    return Pruned(
        torch.cat([part.weight for part in parts]), torch.cat([part.removed for part in parts]), error, error_measure
    )
