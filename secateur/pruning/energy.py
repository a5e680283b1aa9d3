"""Energy compensation: what a mask took of the spread of columns and rows is given back (arXiv 2602.07375, stage 2).

It looks at weights alone. Some rows at a time, so that what is made of them stays in a core's cache; the lanes share them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from secateur.pruning.compensation import ratio, share
from secateur.pruning.lanes import lanes
from secateur.pruning.methods import Pruned
from secateur.recipes import EnergyCompensation

ELEMENTS_IN_CACHE = 1 << 17  # of a part in float32, beside its mask and what it is made of


@dataclass(frozen=True, slots=True)
class _Part:
    """Some rows of W and W', and where weights are gone: (rows, in_features) each."""

    weight: Tensor
    pruned: Tensor
    removed: Tensor


@dataclass(frozen=True, slots=True)
class _Sums:
    """Of a part. `columns`: sums over its rows of W, W^2, W' and W'^2, (4, in_features). `row_sums` and `row_squares`: those
    of W and W^2 over columns, (rows, 1). All float32."""

    columns: Tensor
    row_sums: Tensor
    row_squares: Tensor


@dataclass(frozen=True, slots=True)
class _Line:
    """x becomes `factor` x + `shift`. Both float32, (in_features,) for columns, (rows, 1) for rows."""

    factor: Tensor
    shift: Tensor


def energy_compensated(weights: Sequence[Tensor], pruned: Sequence[Pruned], wanted: EnergyCompensation) -> list[Pruned]:
    """Each W' with the spread of its columns, then of its rows, brought back to that of W, (out_features, in_features).

    With m the mean of a column of W, E = sum (W - m)^2 and E' = sum (W' - m)^2 over the whole column, removed weights
    included, what stays becomes (W' - m) sqrt(E / (E' + epsilon E)) + m; then the same for rows, of what the column step
    gave. Means and E are those of W in both steps. The factors are held within the clamp. That epsilon is relative to E is
    ours: the result does not depend on the weights' scale. The error is that of the weights.
    """
    work = lanes(weights[0].device)
    parts = [list(_parts(weight, each, work.count)) for weight, each in zip(weights, pruned, strict=True)]
    found = iter(work.map(_sums, [part for of_weight in parts for part in of_weight]))
    sums = [[next(found) for _ in of_weight] for of_weight in parts]
    lines = [_of_columns(each, len(weight), wanted) for each, weight in zip(sums, weights, strict=True)]
    tasks = [
        partial(_scaled, part, seen, line, wanted)
        for of_weight, of_part, line in zip(parts, sums, lines, strict=True)
        for part, seen in zip(of_weight, of_part, strict=True)
    ]
    done = iter(work.map(lambda task: task(), tasks))
    return [
        _joined(each, [next(done) for _ in of_weight], of_part)
        for each, of_weight, of_part in zip(pruned, parts, sums, strict=True)
    ]


def _parts(weight: Tensor, pruned: Pruned, count: int) -> Iterator[_Part]:
    """All rows, in order; on the CPU at least `count` parts, on a GPU one."""
    rows, columns = weight.shape
    size = max(1, min(ELEMENTS_IN_CACHE // columns, -(-rows // count))) if weight.device.type == "cpu" else rows
    for each in zip(*(torch.split(whole, size) for whole in (weight, pruned.weight, pruned.removed)), strict=True):
        yield _Part(*each)


def _sums(part: _Part) -> _Sums:
    columns = torch.empty(4, part.weight.shape[1], device=part.weight.device)
    dense = part.weight.to(torch.float32, copy=True)  # (rows, in_features)
    torch.sum(dense, dim=0, out=columns[0])
    row_sums = dense.sum(dim=1, keepdim=True)
    torch.sum(dense.square_(), dim=0, out=columns[1])
    row_squares = dense.sum(dim=1, keepdim=True)
    left = dense.copy_(part.pruned)
    torch.sum(left, dim=0, out=columns[2])
    torch.sum(left.square_(), dim=0, out=columns[3])
    return _Sums(columns, row_sums, row_squares)


def _of_columns(sums: Sequence[_Sums], rows: int, wanted: EnergyCompensation) -> _Line:
    """The column step of a weight of so many `rows`."""
    dense, squares, left, left_squares = torch.stack([part.columns for part in sums]).sum(dim=0, dtype=torch.float64)
    return _line(dense, squares, left, left_squares, rows, wanted)


def _line(
    dense: Tensor, squares: Tensor, left: Tensor, left_squares: Tensor, count: int, wanted: EnergyCompensation
) -> _Line:
    """A step, from the sums of W, W^2, W' and W'^2 over `count` weights: the two energies in terms of them, in float64.

    Where weights differ by less than a thousandth of their mean, that loses E in rounding.
    """
    mean = dense.double() / count
    energy = (squares.double() - count * mean.square()).clamp_min_(0.0)
    energy_left = (left_squares.double() - 2 * mean * left.double() + count * mean.square()).clamp_min_(0.0)
    factor = ratio(energy, energy_left + wanted.epsilon * energy).sqrt().clamp(*wanted.clamp)
    return _Line(factor.float(), (mean * (1 - factor)).float())


def _scaled(part: _Part, sums: _Sums, columns: _Line, wanted: EnergyCompensation) -> tuple[Tensor, Tensor]:
    """A part after both steps, (rows, in_features), and the sum of the squares of what it differs by from the dense one."""
    kept = (part.removed.view(torch.int8) - 1).to(torch.int32)  # all ones where a weight stays
    scaled = part.pruned.to(torch.float32, copy=True)
    _apply(columns, scaled, kept)
    left, left_squares = scaled.sum(dim=1, keepdim=True), torch.linalg.vector_norm(scaled, dim=1, keepdim=True).square_()
    _apply(_line(sums.row_sums, sums.row_squares, left, left_squares, scaled.shape[1], wanted), scaled, kept)
    result = scaled.to(part.weight.dtype, copy=True).add_(0.0)  # what underflows is +0.0, like all that is removed
    lost = torch.linalg.vector_norm(part.weight.to(torch.float32, copy=True).sub_(scaled)).square_()
    return result, lost


def _apply(line: _Line, values: Tensor, kept: Tensor) -> None:
    """In place, and zero where `kept` is; by clearing bits, which does not mind a random mask."""
    values.mul_(line.factor).add_(line.shift)
    values.view(torch.int32).bitwise_and_(kept)


def _joined(pruned: Pruned, parts: Sequence[tuple[Tensor, Tensor]], sums: Sequence[_Sums]) -> Pruned:
    lost, whole = sum(float(lost) for _, lost in parts), sum(float(part.row_squares.sum()) for part in sums)
    weight = torch.cat([result for result, _ in parts])  # (out_features, in_features)
    return replace(pruned, weight=weight, error=share(lost, whole), error_measure="weights")
