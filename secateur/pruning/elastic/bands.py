"""Bands of sparsity rates, each with a pair of low-rank matrices of its own: which a rate is in, and rates to train on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import accumulate

import torch
from torch import Generator

from secateur.recipes import Band, Epts

# The two layouts of the authors: what their code does, and what their paper tells.
SEVEN = tuple(
    Band(upper=upper, rank=8, weight=weight)
    for upper, weight in ((0.40, 0.1), (0.45, 0.1), (0.50, 0.1), (0.55, 0.1), (0.60, 0.2), (0.65, 0.2), (0.70, 0.2))
)
THREE = tuple(
    Band(upper=upper, rank=rank, weight=weight)
    for upper, rank, weight in ((0.50, 24, 0.3), (0.60, 16, 0.3), (0.70, 16, 0.4))
)
PRESETS: Mapping[str, tuple[Band, ...]] = {"seven": SEVEN, "three": THREE}


def bands_of(method: Epts) -> tuple[Band, ...]:
    """The bands that a recipe asks for."""
    return PRESETS[method.bands] if isinstance(method.bands, str) else tuple(method.bands)


def band_of(bands: Sequence[Band], rate: Fraction) -> int:
    """The band that `rate` is in: a band holds its upper end and not its lower one. The last band has no end (ours)."""
    return next((index for index, band in enumerate(bands) if rate <= exact(band.upper)), len(bands) - 1)


def exact(rate: float) -> Fraction:
    """The number as it is written in decimal: 0.7 is 7/10, and so on the boundary and not beside it."""
    return Fraction(str(rate))


def widths(bands: Sequence[Band]) -> list[int]:
    """For each band the rank of its chain: its own pair's and those of all bands below it."""
    return list(accumulate(band.rank for band in bands))


def groups_of(bands: Sequence[Band]) -> list[list[int]]:
    """The lowest band, and the lower and the upper half of the others, as far as there are any."""
    others = list(range(1, len(bands)))
    half = len(others) // 2
    return [group for group in ([0], others[:half], others[half:]) if group]


def streams_of(method: Epts) -> list[list[int]]:
    """The bands that share a stream of activations."""
    bands = bands_of(method)
    return [list(range(len(bands)))] if method.streams == "mixed" else groups_of(bands)


def stratified(bands: Sequence[Band], band: int, count: int, generator: Generator) -> list[float]:
    """`count` rates of a band, (lower, upper]: one drawn uniformly in each of as many equal parts, in random order."""
    upper = bands[band].upper
    lower = bands[band - 1].upper if band else 0.0
    places = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator, dtype=torch.float64)
    rates: list[float] = (upper - (upper - lower) * places / count).tolist()
    return rates


def schedule(bands: Sequence[Band], steps: int, generator: Generator, *, every_band: bool) -> list[list[tuple[int, float]]]:
    """For each step the (band, rate) pairs that are trained, from low rates to high.

    All bands, as the authors have it, or one of each group (ours); then every band of a group has its turn equally often.
    """
    turns = [[band] for band in range(len(bands))] if every_band else groups_of(bands)
    chosen = []
    for group in turns:
        picks = [group[int(turn) % len(group)] for turn in torch.randperm(steps, generator=generator)]
        rates = {band: iter(stratified(bands, band, picks.count(band), generator)) for band in sorted(set(picks))}
        chosen.append([(band, next(rates[band])) for band in picks])
    return [list(pairs) for pairs in zip(*chosen, strict=True)]
