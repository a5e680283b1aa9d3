"""SparseGPT (arXiv 2301.00774): weights go by the optimal brain surgeon's saliency, column after column, and those to the
right of a removed weight are updated to make up for it.

Weights are held transposed, (in_features, out_features), so that a column of the paper is a row in memory. Linears with
the same input are swept together, side by side: each chooses its own mask, and they share every step of the sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.pruning.allocation import Target
from secateur.pruning.masks import lowest_per_layer, n_of_m
from secateur.pruning.methods import Pruned, without
from secateur.pruning.methods.factor import Factor, inverse_factor
from secateur.pruning.statistics import Gram, Statistics, exact_products_of
from secateur.recipes import SparseGPT

ROWS_AT_ONCE = 256  # of a linear, whose part in an error takes memory for no more of them at a time
TILE = 16  # columns that are brought up to date one by one; beyond the tile updates are matrix products


@dataclass(frozen=True, slots=True)
class Swept:
    """A linear after the sweep: the `weight` in float32 and the mask `removed`, both (out_features, in_features).

    `error`: tr(D H DT) / tr(W H WT) with D = W - W' and the undamped H: the relative squared output error on the
    calibration inputs, before W' is rounded.
    """

    weight: Tensor
    removed: Tensor
    error: float


def sparsegpt(
    weights: Sequence[Tensor],
    targets: Sequence[Target],
    factor: Factor,
    block_size: int,
    emphasis: Tensor | None = None,
) -> list[Swept]:
    """Prune linears with the same input, (out_features, in_features) each, in one sweep.

    Unstructured: in each block of `block_size` columns the lowest W^2 / U_jj^2 of all rows of a linear together are removed,
    so many that after each block floor(columns so far x rows x fraction) are. N:M: M - N of each group of columns, chosen
    when the sweep reaches it. `block_size` is rounded down to a multiple of M, but not below M. With `emphasis`,
    (in_features,), saliencies are those of weights times it: what is removed depends on it, how it is made up for does not.
    """
    group, rows = targets[0].group, [len(weight) for weight in weights]
    block_size = max(group[1], block_size // group[1] * group[1]) if group else block_size
    before = torch.cat(list(weights)).float().T.contiguous()  # (in_features, all out_features)
    before[factor.dead] = 0.0
    work, removed = before.clone(), torch.zeros_like(before, dtype=torch.bool)
    scales = factor.upper.diagonal().unsqueeze(1)  # (in_features, 1)
    judged = scales if emphasis is None else scales / emphasis.unsqueeze(1)  # what a weight is divided by to be judged
    losses = torch.zeros(before.shape[1], dtype=torch.float64, device=before.device)  # (all out_features,)
    for start in range(0, len(work), block_size):
        end = min(start + block_size, len(work))
        if group is None:
            saliency = (work[start:end] / judged[start:end]).square()  # (block, all out_features)
            parts, choices = torch.split(saliency, rows, 1), torch.split(removed[start:end], rows, 1)
            for part, chosen, target in zip(parts, choices, targets, strict=True):
                budget = target.count(end * part.shape[1]) - target.count(start * part.shape[1])
                chosen.copy_(lowest_per_layer(part.T, budget).T)  # (block, out_features)
        # what removing a weight does to those to its right, for an error of one
        steps = factor.upper[start:end, start:] / scales[start:end]  # (block, in_features - start)
        errors = _sweep_block(work[start:end], removed[start:end], steps[:, : end - start], judged[start:end], group)
        work[end:].addmm_(steps[:, end - start :].T, errors, alpha=-1.0)
        losses += (errors / scales[start:end]).square().sum(dim=0)
    shares = _relative_errors(weights, before, work, losses, factor)
    del before
    return [
        Swept(after.T.contiguous(), gone.T.contiguous(), share)
        for after, gone, share in zip(torch.split(work, rows, 1), torch.split(removed, rows, 1), shares, strict=True)
    ]


def _sweep_block(work: Tensor, removed: Tensor, steps: Tensor, judged: Tensor, group: tuple[int, int] | None) -> Tensor:
    """Remove and update inside a block, in place; what was removed is returned: later columns have to make up for it.

    `work`, `removed` and the result: (block, out_features); `steps`: (block, block); `judged`: (block, 1).
    """
    columns = len(work)
    tile = max(group[1], TILE // group[1] * group[1]) if group else TILE
    errors = torch.empty_like(work)
    # A column alone is so little work that calling torch is most of it; numpy is called in a third of the time.
    w, r, e, s = (_array(each) for each in (work, removed, errors, steps.T.contiguous()))
    for start in range(0, columns, tile):
        end = min(start + tile, columns)
        together = group[1] if group else tile  # columns whose mask is known when the first of them is reached
        for first in range(start, end, together):
            last = min(first + together, end)
            w[first:last] -= s[first:last, start:first] @ e[start:first]  # (together, out_features)
            if group:
                saliency = (work[first:last] / judged[first:last]).square()  # (group, out_features)
                removed[first:last] = n_of_m(saliency.T, *group).T
            for j in range(first, last):
                w[j] -= s[j, first:j] @ e[first:j]
                e[j] = w[j] * r[j]
        work[end:].addmm_(steps[start:end, end:].T, errors[start:end], alpha=-1.0)
    work -= errors
    return errors


def _array(tensor: Tensor) -> Any:
    """The tensor itself, as a numpy array where it is on the CPU."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _relative_errors(
    weights: Sequence[Tensor], before: Tensor, after: Tensor, losses: Tensor, factor: Factor
) -> list[float]:
    """The errors that `Swept` has, from what the sweep knows.

    With D = E U, E the removed weights over U_jj, and H^-1 = UT U for the damped H, tr(D H DT) is the sum of E^2: `losses`,
    by output row, (all out_features,). The damping's part of it, damping x D^2, is taken off. `before`, which is
    overwritten, and `after`: (in_features, all out_features).
    """
    rows = [len(weight) for weight in weights]
    with exact_products_of(weights[0].dtype):  # the Gram is rounded to bfloat16 in it, which a sum of so many does not show
        whole = [_energy(linear, factor.gram) for linear in torch.split(before, rows, 1)]
    lost = losses - factor.damping * before.sub_(after).square_().sum(dim=0)  # (all out_features,)
    sums = zip(torch.split(lost, rows), whole, strict=True)
    return [max(0.0, float(gone.sum()) / everything) if everything > 0 else 0.0 for gone, everything in sums]


def _energy(transposed: Tensor, gram: Tensor) -> float:
    """tr(W H WT) of WT, (in_features, out_features), and H, (in_features, in_features)."""
    parts = torch.split(transposed, ROWS_AT_ONCE, 1)
    return sum(float((gram @ part).mul_(part).sum(dtype=torch.float64)) for part in parts)


class SparseGPTMethod:
    def __init__(self, parameters: SparseGPT) -> None:
        self._parameters = parameters

    def prepare(self, statistics: Statistics | None) -> Factor:
        assert isinstance(statistics, Gram), "the registry says that SparseGPT observes the Gram"  # noqa: S101 - for the type checker
        return inverse_factor(statistics.total, self._parameters.damping)

    def prune(
        self, weights: Sequence[Tensor], targets: Sequence[Target], prepared: Factor, emphasis: Tensor | None = None
    ) -> list[Pruned]:
        swept = sparsegpt(weights, targets, prepared, self._parameters.block_size, emphasis)
        return [
            Pruned(without(done.weight.to(weight.dtype), done.removed), done.removed, done.error, "gram", prepared.fallbacks)
            for weight, done in zip(weights, swept, strict=True)
        ]
