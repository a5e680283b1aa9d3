"""How heavy the tails of the weights' spectra are: what AlphaPruning (arXiv 2410.10912) allocates sparsity by."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

BINS = 100  # of the histogram of log10 eigenvalues
AROUND_PEAK = (0.95, 1.5)  # where the tail may begin, in units of the histogram's peak
LEAST = 1e-12  # eigenvalues below this part of the largest are rounding


def tail_exponent(weight: Tensor) -> float:
    """alpha of the power law that the tail of `weight`'s spectrum follows best; nan if it has no two different values, or
    the weight is not finite.

    `weight`: (out_features, in_features); its spectrum are the squared singular values, l. For each l_min near the peak of
    their histogram, Hill's estimator is alpha = 1 + n / sum log(l / l_min) over the n values from l_min on; the one counts
    whose distance from the power law, Kolmogorov and Smirnov's, is least. Larger: lighter-tailed, less trained.
    """
    if not bool(weight.isfinite().all()):
        return float("nan")
    values = torch.linalg.svdvals(weight.float()).double().square().flip(0)  # ascending
    values = values[values > values[-1] * LEAST]
    if len(values) < 2 or bool(values[0] == values[-1]):
        return float("nan")
    peak = _peak(values)
    starts = ((values >= AROUND_PEAK[0] * peak) & (values <= AROUND_PEAK[1] * peak) & (values < values[-1])).nonzero()
    fits = [_fit(values[start:]) for start in starts.flatten().tolist()]
    return min(fits)[1] if fits else float("nan")


def _peak(values: Tensor) -> float:
    """The left edge of the fullest bin, (count,) to a number."""
    logs = values.log10().float()
    counts = torch.histc(logs, BINS, float(logs[0]), float(logs[-1]))
    edges = torch.linspace(float(logs[0]), float(logs[-1]), BINS + 1)
    return float(10 ** edges[int(counts.argmax())])


def _fit(tail: Tensor) -> tuple[float, float]:
    """Distance and alpha of the power law that begins at the first of `tail`, (n,), ascending."""
    n, relative = len(tail), tail / tail[0]
    alpha = 1 + n / float(relative.log().sum())
    empirical = torch.arange(n, dtype=tail.dtype, device=tail.device) / n
    return float((1 - relative ** (1 - alpha) - empirical).abs().max()), alpha


def block_exponents(blocks: Iterable[Iterable[Tensor]]) -> list[float]:
    """The mean exponent of each block's linears; those without one do not count. A block without has the blocks' mean."""
    means = [torch.tensor([tail_exponent(weight) for weight in block]).nanmean() for block in blocks]
    exponents = torch.stack(means)  # (blocks,)
    return exponents.nan_to_num(float(exponents.nanmean().nan_to_num(1.0))).tolist()
