"""Energy compensation: what a mask took of the spread of columns and rows is given back (arXiv 2602.07375, stage 2).

It looks at weights alone. Some rows at a time: the system's zeroed pages for float32 copies of a whole weight would take
three times as long as all of the arithmetic. Operations on a part are over before threads have met, so each has one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from secateur.pruning.compensation import factors_clamped, ratio, share
from secateur.pruning.lanes import map_short
from secateur.pruning.methods import Pruned
from secateur.recipes import EnergyCompensation

MOST_ELEMENTS = 15 << 14  # of a part, which then takes less than a MiB in float32: malloc keeps that for the next


@dataclass(frozen=True, slots=True)
class _Part:
    """Some rows of W and W', where weights are gone, and what W' becomes: (rows, in_features) each."""

    weight: Tensor
    pruned: Tensor
    removed: Tensor
    result: Tensor


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of a part. `columns`: sums over its rows of W, W^2, W' and W'^2, (4, in_features). `rows`: those of W and W^2 over
    columns, (2, rows, 1). All float32."""

    columns: Tensor
    rows: Tensor


@dataclass(frozen=True, slots=True)
class _Line:
    """x becomes `factor` x + `shift`. Both float32, (in_features,) for columns, (rows, 1) for rows. `clamped`: how many
    factors the clamp held back."""

    factor: Tensor
    shift: Tensor
    clamped: Tensor


def energy_compensated(weight: Tensor, pruned: Pruned, wanted: EnergyCompensation) -> Pruned:
    """W' with the spread of its columns, then of its rows, brought back to that of W, (out_features, in_features).

    With m the mean of a column of W, E = sum (W - m)^2 and E' = sum (W' - m)^2 over the whole column, removed weights
    included, what stays becomes (W' - m) sqrt(E / (E' + epsilon E)) + m; then the same for rows, of what the column step
    gave. Means and E are those of W in both steps. The factors are held within the clamp; how many it held back is told.
    That epsilon is relative to E is ours: the result does not depend on the weights' scale. The error is that of weights.
    """
    result = torch.empty_like(weight)
    parts = list(_parts(weight, pruned, result))
    sums = map_short(_sums, parts, weight.device)
    columns = torch.zeros(4, weight.shape[1], dtype=torch.float64, device=weight.device)
    for each in sums:
        columns += each.columns
    (line,) = map_short(partial(_line, count=len(weight), wanted=wanted), [columns], weight.device)
    scale = partial(_scale, columns=line, wanted=wanted)
    lost, clamped = zip(*map_short(scale, list(zip(parts, sums, strict=True)), weight.device), strict=True)
    return replace(
        pruned,
        weight=result,
        error=share(float(torch.stack(lost).sum(dtype=torch.float64)), float(columns[1].sum())),
        error_measure="weights",
        fallbacks=(*pruned.fallbacks, *factors_clamped(torch.stack([line.clamped, *clamped]).sum())),
    )


def _parts(weight: Tensor, pruned: Pruned, result: Tensor) -> Iterator[_Part]:
    """All rows, in order; on a GPU in one part."""
    size = max(1, MOST_ELEMENTS // weight.shape[1]) if weight.device.type == "cpu" else len(weight)
    wholes = (weight, pruned.weight, pruned.removed, result)
    for each in zip(*(torch.split(whole, size) for whole in wholes), strict=True):
        yield _Part(*each)


def _sums(part: _Part) -> _Sums:
    columns = torch.empty(4, part.weight.shape[1], device=part.weight.device)
    dense = _copy(part.weight)
    torch.sum(dense, dim=0, out=columns[0])
    rows = _row_sums(dense)
    torch.sum(dense.square_(), dim=0, out=columns[1])
    left = dense.copy_(part.pruned)
    torch.sum(left, dim=0, out=columns[2])
    torch.sum(left.square_(), dim=0, out=columns[3])
    return _Sums(columns, rows)


def _copy(weights: Tensor) -> Tensor:
    """In float32 and row by row, however `weights` lie in memory: sums of both W and W' are made in one order."""
    return weights.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _row_sums(values: Tensor) -> Tensor:
    """Sums of each row of `values` and of their squares, (2, rows, 1). By the same operations for W and W': where nothing
    was removed both come to the same, and nothing changes."""
    norms = torch.linalg.vector_norm(values, dim=1, keepdim=True)
    return torch.stack([values.sum(dim=1, keepdim=True), norms.square_()])


def _line(sums: Tensor, count: int, wanted: EnergyCompensation) -> _Line:
    """A step, from the `sums` of W, W^2, W' and W'^2 over `count` weights, (4, …): both energies in terms of them, in
    float64. The sums were float32, so E errs by up to 7e-7 of the squared mean: by nearly a hundredth where weights differ
    by a hundredth of their mean."""
    dense, squares, left, left_squares = sums.double()
    mean = dense / count
    energy = (squares - count * mean.square()).clamp_min_(0.0)
    energy_left = (left_squares - 2 * mean * left + count * mean.square()).clamp_min_(0.0)
    wished = ratio(energy, energy_left + wanted.epsilon * energy).sqrt().float()
    factor = wished.clamp(*wanted.clamp)
    return _Line(factor, (mean * (1 - factor.double())).float(), (factor != wished).sum())


def _scale(item: tuple[_Part, _Sums], columns: _Line, wanted: EnergyCompensation) -> tuple[Tensor, Tensor]:
    """Both steps, into the part's `result`: what is lost of W, squared, and how many rows' factors the clamp held back."""
    part, sums = item
    kept = (1 - part.removed.view(torch.int8)).to(torch.float32)
    values = _copy(part.pruned)
    _apply(columns, values, kept)
    rows = _line(torch.cat([sums.rows, _row_sums(values)]), values.shape[1], wanted)
    _apply(rows, values, kept)
    part.result.copy_(values).add_(0.0)  # what underflows is +0.0, like all that is removed
    lost = kept.copy_(part.weight).sub_(values)  # (rows, in_features)
    return torch.linalg.vector_norm(lost).square_(), rows.clamped


def _apply(line: _Line, values: Tensor, kept: Tensor) -> None:
    """In place. What is removed is zero and gets no shift: by a product, which does not mind a random mask."""
    values.mul_(line.factor).addcmul_(line.shift, kept)
