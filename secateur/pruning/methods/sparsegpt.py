"""SparseGPT (arXiv 2301.00774): weights go by the optimal brain surgeon's saliency, column after column, and those to the
right of a removed weight are updated to make up for it.

Weights are held transposed, (in_features, out_features), so that a column of the paper is a row in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.problems import ProblemError
from secateur.pruning.masks import count_of, lowest_per_layer, n_of_m
from secateur.pruning.methods import Pruned, without
from secateur.pruning.statistics import Gram, Statistics
from secateur.recipes import SparseGPT, Sparsity

TILE = 16  # columns that are updated one by one; beyond the tile updates are matrix products
MAX_DAMPING_RAISES = 4


@dataclass(frozen=True, slots=True)
class Factor:
    """What linears with the same input share.

    `upper`: U, upper triangular with H^-1 = UT U, float32, (in_features, in_features). `gram`: the undamped H that errors
    are measured in. `dead`: inputs that were always zero, (in_features,). `fallbacks`: see `Pruned`.
    """

    upper: Tensor
    gram: Tensor
    dead: Tensor
    fallbacks: tuple[str, ...]


def inverse_factor(gram: Tensor, damping: float) -> Factor:
    """Factor the inverse of H = `gram` + `damping` x mean(diagonal) x I; dead inputs get a one on the diagonal.

    `gram`: (in_features, in_features), any positive multiple of the sum of x xT. With J the reversal of the axes,
    J H J = L LT gives U = J L^-1 J: one factorisation and one triangular inverse. If float32 does not find H positive
    definite, float64 is tried, then more damping, tenfold each time; both are recorded. Raises ProblemError
    `nonfinite_activation` for a Gram that no damping of that range makes positive definite.
    """
    dead = gram.diagonal() == 0  # (in_features,)
    mean = gram.diagonal().double().mean().item() or 1.0
    scaled = gram / mean  # so that damping and dead inputs are of the diagonal's size, whatever the inputs' size
    fallbacks: list[str] = [f"dead_inputs:{int(dead.sum())}"] if bool(dead.any()) else []
    attempts = [(torch.float32, damping)] + [(torch.float64, damping * 10**k) for k in range(MAX_DAMPING_RAISES + 1)]
    for attempt, (dtype, amount) in enumerate(attempts):
        reversed_h = scaled.to(dtype, copy=True)
        reversed_h.diagonal().add_(amount + dead.to(dtype))
        lower, failed = torch.linalg.cholesky_ex(reversed_h.flip(0, 1))
        if not failed.item():
            if attempt:
                fallbacks.append(f"cholesky_float64:damping={amount:g}")
            identity = torch.eye(len(gram), dtype=dtype, device=gram.device)
            inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
            return Factor(inverse.flip(0, 1).float(), scaled, dead, tuple(fallbacks))
    raise ProblemError(
        "nonfinite_activation",
        f"The Gram matrix of an input is not positive definite, not even with damping {attempts[-1][1]:g} in float64.",
        hint="The calibration activations are degenerate or too large: use more calibration text, or float32.",
    )


def sparsegpt(weight: Tensor, factor: Factor, sparsity: Sparsity, block_size: int) -> tuple[Tensor, Tensor]:
    """The pruned weight in float32 and its mask of removed weights, both (out_features, in_features).

    Unstructured: in each block of `block_size` columns the lowest W^2 / U_jj^2 of all rows together are removed, so many
    that after each block floor(columns so far x rows x target) are. N:M: M - N of each group of columns, chosen when the
    sweep reaches it. `block_size` is rounded down to a multiple of M, but not below M.
    """
    _, columns = weight.shape
    group = sparsity.group
    block_size = max(group[1], block_size // group[1] * group[1]) if group else block_size
    work = weight.float().T.contiguous()  # (in_features, out_features)
    work[factor.dead] = 0.0
    removed = torch.zeros_like(work, dtype=torch.bool)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        upper = factor.upper[start:end, start:end]
        if group is None:
            saliency = (work[start:end] / upper.diagonal().unsqueeze(1)).square()  # (block, out_features)
            budget = count_of(end * len(weight), sparsity.target) - count_of(start * len(weight), sparsity.target)
            removed[start:end] = lowest_per_layer(saliency.T, budget).T
        errors = _sweep_block(work[start:end], removed[start:end], upper, group)
        work[end:].addmm_(factor.upper[start:end, end:].T, errors, alpha=-1.0)
    return work.T.contiguous(), removed.T.contiguous()


def _sweep_block(work: Tensor, removed: Tensor, upper: Tensor, group: tuple[int, int] | None) -> Tensor:
    """Remove and update inside a block, in place; the scaled errors that later columns have to make up for are returned.

    `work`, `removed` and the result: (block, out_features); `upper`: (block, block).
    """
    columns = len(work)
    tile = max(group[1], TILE // group[1] * group[1]) if group else TILE
    errors = torch.empty_like(work)
    for start in range(0, columns, tile):
        end = min(start + tile, columns)
        for j in range(start, end):
            if group and (j - start) % group[1] == 0:
                scales = upper.diagonal()[j : j + group[1]].unsqueeze(1)  # (group, 1)
                saliency = (work[j : j + group[1]] / scales).square()  # (group, out_features)
                removed[j : j + group[1]] = n_of_m(saliency.T, *group).T
            torch.mul(work[j], removed[j], out=errors[j])
            work[j] -= errors[j]
            errors[j] /= upper[j, j]
            work[j + 1 : end].addr_(upper[j, j + 1 : end], errors[j], alpha=-1.0)
        work[end:].addmm_(upper[start:end, end:].T, errors[start:end], alpha=-1.0)
    return errors


def gram_error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    """tr(D H DT) / tr(W H WT) with D = W - W': the relative squared output error on the calibration inputs.

    `weight` and `pruned`: (out_features, in_features); `gram`: H, (in_features, in_features).
    """
    wide = weight.float()
    difference = wide - pruned.float()
    lost, whole = ((matrix @ gram).mul_(matrix).sum().item() for matrix in (difference, wide))
    return max(0.0, lost / whole) if whole > 0 else 0.0


class SparseGPTMethod:
    def __init__(self, parameters: SparseGPT, sparsity: Sparsity) -> None:
        self._parameters, self._sparsity = parameters, sparsity

    def prepare(self, statistics: Statistics | None) -> Factor:
        assert isinstance(statistics, Gram), "the registry says that SparseGPT observes the Gram"  # noqa: S101 - for the type checker
        return inverse_factor(statistics.total, self._parameters.damping)

    def prune(self, weight: Tensor, prepared: Factor) -> Pruned:
        updated, removed = sparsegpt(weight, prepared, self._sparsity, self._parameters.block_size)
        pruned = without(updated.to(weight.dtype), removed)
        return Pruned(pruned, removed, gram_error(weight, pruned, prepared.gram), "gram", prepared.fallbacks)
