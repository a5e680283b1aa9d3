"""A block with other weights than its own, and what the next block gets: outputs at rates of all bands, mixed (MSFM)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor, nn

from secateur.pruning.elastic.bands import stratified
from secateur.pruning.elastic.linear import Linears, weights_at
from secateur.pruning.lanes import Lanes
from secateur.pruning.linears import Linear
from secateur.pruning.streaming import MicroBatch, run_block
from secateur.recipes import Band


@contextmanager
def wearing(block: nn.Module, linears: Sequence[Linear], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the `linears` of `block` have `weights`, (out_features, in_features) by their names below it, as their own.

    Whatever runs the block sees them, also from other threads; gradients flow to them.
    """
    modules = [(linear, block.get_submodule(linear.module)) for linear in linears]
    own = [module._parameters.pop("weight") for _, module in modules]
    try:
        with torch.enable_grad():  # a transposed one is a view that has to pass the gradient on
            for linear, module in modules:
                weight = weights[linear.module]
                module.weight = weight.T if linear.transposed else weight
        yield
    finally:
        for (_, module), parameter in zip(modules, own, strict=True):
            module.__dict__.pop("weight", None)
            module._parameters["weight"] = parameter


@dataclass(frozen=True, slots=True)
class Placed:
    """A block with its weights, its place in the model, its linears, and the lanes that it runs in."""

    block: nn.Module
    index: int
    linears: Sequence[Linear]
    lanes: Lanes

    def outputs(self, weights: Mapping[str, Tensor], batches: Sequence[MicroBatch]) -> list[Tensor]:
        """The block's outputs, (batch, seq, hidden) each, its linears having `weights`."""
        with wearing(self.block, self.linears, weights):
            return self.lanes.map(partial(run_block, self.block, self.index), batches)


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
        outputs = placed.outputs(weights_at(linears, bands, rate), batches)
        for total, output in zip(sums, outputs, strict=True):
            total.add_(output, alpha=bands[band].weight / whole)
    return [total.to(batch.hidden.dtype) for total, batch in zip(sums, batches, strict=True)]
