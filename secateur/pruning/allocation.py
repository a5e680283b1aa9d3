"""How much of each linear is removed: a recipe's target, divided among blocks and linears. Torch-free.

An allocation gives each linear a line, offset + slope x level; the level, the same for all, is raised until the target is
met. No linear leaves what it can give, between nothing and all weights but one. Counts are whole, and their sum is exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from secateur.problems import at
from secateur.pruning.linears import Linear
from secateur.recipes import (
    AlphaPruningAllocation,
    OWLAllocation,
    PerBlockAllocation,
    PerLinearAllocation,
    Sparsity,
    UniformAllocation,
)

HALVINGS = 200  # of the interval that the level is in: more than a float has use for

Block = Mapping[str, int]  # a block's linears: the number of weights of each, by its tensor's name
Line = tuple[float, float]  # the fraction that a linear gives at a level: offset and slope


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked of one linear.

    `name`: its tensor's. `fraction`: of its weights that are removed, exact: a method removes floor(weights x fraction).
    `group`: (N, M) if of each M consecutive inputs of a row N are kept; the fraction is then 1 - N/M.
    """

    name: str
    fraction: Fraction
    group: tuple[int, int] | None = None

    def count(self, weights: int) -> int:
        """floor(`weights` x fraction)."""
        return int(weights * self.fraction)


def uniform(sparsity: Sparsity, names: Iterable[str]) -> dict[str, Target]:
    """The same target for each of the linears `names`; a decimal number is taken as it is written: 0.3 is 3/10."""
    group = sparsity.group
    fraction = 1 - Fraction(*group) if group else Fraction(str(sparsity.target))
    return {name: Target(name, fraction, group) for name in names}


def blocks_of(linears: Sequence[Sequence[Linear]]) -> list[Block]:
    """The sizes of a model's linears, block by block."""
    return [{linear.name: linear.out_features * linear.in_features for linear in block} for block in linears]


def allocate(sparsity: Sparsity, blocks: Sequence[Block], scores: Sequence[float] = ()) -> dict[str, Target]:
    """The target of every linear. If it is not the same for all, floor(all weights x target) are removed together.

    `scores`: one of each block, for an allocation that looks at the model: outliers (OWL) or exponents (AlphaPruning).
    Raises ProblemError `allocation_impossible`, with a pointer into the recipe, if the allocation does not fit the blocks or
    cannot meet the target.
    """
    names = [name for block in blocks for name in block]
    if isinstance(sparsity.allocation, UniformAllocation):
        return uniform(sparsity, names)
    sizes = [size for block in blocks for size in block.values()]
    total = int(sum(sizes) * Fraction(str(sparsity.target)))
    lines = _lines(sparsity.allocation, blocks, scores)
    if total > sum(size - 1 for size, (_, slope) in zip(sizes, lines, strict=True) if slope):
        raise at(
            "/sparsity/allocation",
            "allocation_impossible",
            f"A sparsity of {sparsity.target:g} over all linears cannot be met by those that the allocation prunes at all.",
            hint="Lower the target, or give more linears a ratio above zero.",
        )
    counts = _level(lines, sizes, total)
    return {name: Target(name, Fraction(count, size)) for name, size, count in zip(names, sizes, counts, strict=True)}


def _lines(
    rule: PerBlockAllocation | PerLinearAllocation | OWLAllocation | AlphaPruningAllocation,
    blocks: Sequence[Block],
    scores: Sequence[float],
) -> list[Line]:
    if isinstance(rule, PerLinearAllocation):
        return [(0.0, ratio) for ratio in _ratios(rule, [name for block in blocks for name in block])]
    if isinstance(rule, PerBlockAllocation):
        if len(rule.ratios) != len(blocks):
            raise at(
                "/sparsity/allocation/ratios",
                "allocation_impossible",
                f"There are {len(rule.ratios)} ratios; the model has {len(blocks)} blocks.",
                hint="Give one ratio for each block, the first block's first.",
            )
        of_block = [(0.0, ratio) for ratio in rule.ratios]
    elif isinstance(rule, OWLAllocation):
        of_block = [(-2 * rule.limit * part, 1.0) for part in _spread_out(scores)]
    else:
        of_block = [(0.0, 1 - rule.spread + 2 * rule.spread * part) for part in _spread_out(scores)]
    return [line for line, block in zip(of_block, blocks, strict=True) for _ in block]


def _ratios(rule: PerLinearAllocation, names: list[str]) -> list[float]:
    """The ratio of the longest key that is in a name as a whole, and one where none is."""
    keys = sorted(rule.ratios, key=len)
    for key in keys:
        if not any(_within(key, name) for name in names):
            raise at(
                f"/sparsity/allocation/ratios/{key}",
                "allocation_impossible",
                f"No linear that is pruned has '{key}' in its name.",
                hint=f"The first one is '{names[0]}'.",
            )
    return [next((rule.ratios[key] for key in reversed(keys) if _within(key, name)), 1.0) for name in names]


def _within(key: str, name: str) -> bool:
    return f".{key}." in f".{name}."


def _spread_out(scores: Sequence[float]) -> list[float]:
    """`scores` stretched to [0, 1]; zeros if they are all the same."""
    low, high = min(scores), max(scores)
    return [(score - low) / (high - low) if high > low else 0.0 for score in scores]


def _level(lines: Sequence[Line], sizes: Sequence[int], total: int) -> list[int]:
    """How many each linear gives at the level where they give `total` together."""

    def given(level: float) -> list[float]:
        parts = zip(lines, sizes, strict=True)
        return [min(max(size * (offset + slope * level), 0.0), size - 1.0) for (offset, slope), size in parts]

    low = min(-offset / slope for offset, slope in lines if slope)
    high = max((1 - offset) / slope for offset, slope in lines if slope)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(given(middle)) < total else (low, middle)
    return _whole(given(high), total)


def _whole(parts: Sequence[float], total: int) -> list[int]:
    """`parts`, which sum up to `total` but for rounding, rounded up or down so that they do. Largest remainders go up."""
    counts = [int(part) for part in parts]
    order = sorted(range(len(parts)), key=lambda i: (counts[i] - parts[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts
