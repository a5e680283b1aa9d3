"""A block that is loaded, its linears, and what it gives with other weights than its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from secateur.pruning.lanes import Lanes
from secateur.pruning.linears import Linear
from secateur.pruning.streaming import MicroBatch, run_block


def turned(linear: Linear, weight: Tensor) -> Tensor:
    """A weight as it is stored, (out_features, in_features), and the other way round."""
    return weight.T.contiguous() if linear.transposed else weight


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
