"""What the next block gets: outputs at rates of all bands, mixed (MSFM)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Generator, Tensor

from secateur.pruning.elastic.bands import stratified
from secateur.pruning.elastic.linear import Linears, weights_at
from secateur.pruning.placed import Placed
from secateur.pruning.streaming import MicroBatch
from secateur.recipes import Band


def mixing_rates(bands: Sequence[Band], generator: Generator) -> list[float]:
    """One rate of each band, for all samples alike."""
    return [stratified(bands, band, 1, generator)[0] for band in range(len(bands))]


def mix(
    placed: Placed, linears: Linears, bands: Sequence[Band], rates: Mapping[int, float], batches: Sequence[MicroBatch]
) -> list[Tensor]:
    """Sum over the bands in `rates` of share x the block's output at the band's rate, for each micro-batch: (batch, seq,
    hidden). The shares are the bands' weights, made to add up to 1."""
    sums = [torch.zeros_like(batch.hidden, dtype=torch.float32) for batch in batches]
    whole = sum(bands[band].weight for band in rates)
    for band, rate in rates.items():
        outputs = placed.outputs(weights_at(linears, bands, rate, placed.lanes), batches)
        for total, output in zip(sums, outputs, strict=True):
            total.add_(output, alpha=bands[band].weight / whole)
    return [total.to(batch.hidden.dtype) for total, batch in zip(sums, batches, strict=True)]
