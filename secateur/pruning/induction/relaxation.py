"""How a loss sees a hard mask: the slope of each masked weight in the logarithm of its score.

A weight stays if its log-score l is above the threshold t of those that it competes with: its row, or its group of N:M. In
the forward pass the mask is hard. In the backward pass it is a sigmoid of (l - t) / tau, and t moves with the scores: those
who compete always leave the same number, so sum_j s'((l_j - t) / tau) (dl_j - dt) = 0. With G the gradient of the loss by
the masked weight, P = s'((l - t) / tau) / tau and A = G W, this gives

    dL/dl_j = P_j (A_j - sum_k P_k A_k / sum_k P_k)        over those that j competes with.

All of it is ours: the paper does not say how a gradient passes its mask.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.pruning.allocation import Target
from secateur.pruning.masks import kth_lowest
from secateur.pruning.methods import without
from secateur.pruning.statistics import ELEMENTS_IN_CACHE


@dataclass(frozen=True, slots=True)
class Relaxed:
    """A linear at some scores. All (out_features, in_features), in the dtype of the weight.

    `masked`: the weight with zeros where it is removed. `slope`: P W. `share`: P over its sum among those that compete,
    who are groups of `group` columns, or rows.
    """

    masked: Tensor
    slope: Tensor
    share: Tensor
    group: int | None


def relax(weight: Tensor, scores: Tensor, shift: Tensor, target: Target, tau: float) -> Relaxed:
    """`weight` under the mask of `scores` + `shift`.

    `scores`: the logarithms, float32, as `weight` (out_features, in_features); `shift`: theta, (in_features,).
    """
    masked, slope, share = (torch.empty_like(weight) for _ in range(3))
    result = Relaxed(masked, slope, share, target.group[1] if target.group else None)
    rows = max(1, ELEMENTS_IN_CACHE // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        logs = scores[part] + shift  # (rows, in_features)
        above = _less_threshold(logs, target)
        result.masked[part] = without(weight[part], above <= 0)
        sigmoid = above.mul_(1 / tau).sigmoid_()
        steep = torch.addcmul(sigmoid, sigmoid, sigmoid, value=-1.0).mul_(1 / tau)  # P
        torch.mul(weight[part], steep.to(weight.dtype), out=result.slope[part])
        whole = _summed(steep, result.group).clamp_min_(torch.finfo(steep.dtype).tiny)
        result.share[part] = steep.mul_(whole.reciprocal_())
    return result


def _less_threshold(logs: Tensor, target: Target) -> Tensor:
    """How far each of `logs`, (rows, in_features), lies above its threshold: (rows, in_features)."""
    if target.group:
        kept, group = target.group
        members = sorted_columns(logs, group)
        threshold = (members[group - kept - 1] + members[group - kept]) / 2  # (rows, in_features / group)
        return logs - _repeated(threshold, group)
    gone = int(logs.shape[1] * target.fraction)
    return logs - kth_lowest(logs, gone) if gone else torch.full_like(logs, torch.inf)


def sorted_columns(values: Tensor, group: int) -> list[Tensor]:
    """The lowest of each `group` consecutive columns, the second lowest, and so on: (rows, columns / group) each.

    Neighbours are put in order in turn, `group` times: with so few, many times as fast as a sort of each group.
    """
    members = [values[:, place::group].contiguous() for place in range(group)]  # (rows, columns / group) each
    for turn in range(group):
        for low in range(turn % 2, group - 1, 2):
            members[low], members[low + 1] = (
                torch.minimum(members[low], members[low + 1]),
                torch.maximum(members[low], members[low + 1]),
            )
    return members


def _summed(values: Tensor, group: int | None) -> Tensor:
    """The sum over those that each of `values`, (rows, columns), competes with: (rows, columns), or (rows, 1)."""
    if group is None:
        return values.sum(dim=1, keepdim=True)
    sums = values[:, 0::group].clone()  # (rows, columns / group)
    for place in range(1, group):
        sums += values[:, place::group]
    return _repeated(sums, group)


def _repeated(values: Tensor, group: int) -> Tensor:
    """Each of `values`, (rows, groups), `group` times: (rows, groups x group). Twice as fast as repeat_interleave."""
    return values.unsqueeze(2).expand(-1, -1, group).reshape(len(values), -1)


def gradient(relaxed: Relaxed, of_masked: Tensor) -> Tensor:
    """The gradient by theta, (in_features,), float32, where that by the masked weight is `of_masked`, of its shape."""
    total = torch.zeros(of_masked.shape[1], dtype=torch.float32, device=of_masked.device)
    rows = max(1, ELEMENTS_IN_CACHE // of_masked.shape[1])
    for start in range(0, len(of_masked), rows):
        part = slice(start, start + rows)
        moved, share = (of_masked[part] * relaxed.slope[part]).float(), relaxed.share[part].float()  # (rows, in_features)
        if relaxed.group is None:
            total += moved.sum(dim=0).addmv_(share.T, moved.sum(dim=1), alpha=-1.0)
        else:
            total += moved.addcmul_(share, _summed(moved, relaxed.group), value=-1.0).sum(dim=0)
    return total
