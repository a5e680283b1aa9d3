"""An elastic model at a rate, walked through like any other, without a checkpoint of it being written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from secateur.pruning.checkpoint import Checkpoint
from secateur.pruning.elastic.artifact import Elastic
from secateur.pruning.elastic.linear import weights_at
from secateur.pruning.families import Family
from secateur.pruning.linears import linears_of
from secateur.pruning.placed import wearing
from secateur.pruning.streaming import StreamedModel


class RatedModel(StreamedModel):
    """`elastic`, whose base is the checkpoint, with every linear at `rate`. The rest is `StreamedModel`'s."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        family: Family,
        dtype: torch.dtype,
        device: torch.device,
        *,
        elastic: Elastic,
        rate: float,
    ) -> None:
        super().__init__(checkpoint, family, dtype, device)
        self._elastic, self._rate = elastic, rate
        self._linears = linears_of(checkpoint.headers, family)

    @contextmanager
    def block(self, index: int, written: Checkpoint | None = None) -> Iterator[nn.Module]:
        with super().block(index, written) as block:
            linears = self._linears[index]
            made = self._elastic.linears(self._checkpoint, linears, index, self._dtype)
            weights = weights_at(made, self._elastic.header.bands, self._rate, self.lanes)
            with wearing(block, linears, {name: weight.to(self.device) for name, weight in weights.items()}):
                yield block
