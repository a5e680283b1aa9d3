"""What a method may know of a linear's inputs, accumulated micro-batch by micro-batch: norms, or the Gram matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from secateur.pruning.registry import Observes

TOKENS_AT_ONCE = 1024  # that are widened to float32 at a time
STRIP = 256  # rows of the Gram that are one matrix product


class Statistics(Protocol):
    """An accumulator over the inputs of a linear."""

    def add(self, inputs: Tensor) -> None:
        """Take in `inputs`, (…, in_features); every leading axis is a token."""

    @property
    def squares(self) -> Tensor:
        """Sum over tokens of each input's square, (in_features,)."""


class InputNorms:
    """The sum of squares of each input; a vector is all that is ever held."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._squares = torch.zeros(in_features, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor) -> None:
        for tokens in torch.split(inputs.flatten(0, -2), TOKENS_AT_ONCE):  # (tokens, in_features)
            self._squares += tokens.float().square().sum(dim=0)

    @property
    def squares(self) -> Tensor:
        return self._squares


class Gram:
    """The raw sum over tokens of x xT, (in_features, in_features), in float32. Nothing is scaled on the way.

    The matrix is symmetric: only its lower triangle is accumulated, in strips of rows, and mirrored when it is read. There
    is never a second one: a caller of `total` that needs no more of this object may overwrite it.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._lower = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def add(self, inputs: Tensor) -> None:
        for tokens in torch.split(inputs.flatten(0, -2), TOKENS_AT_ONCE):  # (tokens, in_features)
            with exact_products_of(tokens.dtype):
                wide = tokens.float()
                for start in range(0, len(self._lower), STRIP):
                    end = min(start + STRIP, len(self._lower))
                    self._lower[start:end, :end].addmm_(wide[:, start:end].T, wide[:, :end])  # (strip, end)

    @property
    def total(self) -> Tensor:
        """The whole matrix, (in_features, in_features)."""
        for start in range(STRIP, len(self._lower), STRIP):
            strip = self._lower[start : start + STRIP, :start]  # (strip, start)
            self._lower[:start, start : start + STRIP] = strip.T
        return self._lower

    @property
    def squares(self) -> Tensor:
        return self._lower.diagonal()


def observer(observes: Observes, in_features: int, device: torch.device) -> Statistics:
    """An empty accumulator of the kind that a method declares."""
    return Gram(in_features, device) if observes == "gram" else InputNorms(in_features, device)


@contextmanager
def exact_products_of(dtype: torch.dtype) -> Iterator[None]:
    """Let the CPU multiply float32 tensors that hold bfloat16 values with its bfloat16 units.

    Such products are exact in float32 and are summed in float32, so the result is no worse than that of a float32 product,
    and where the CPU has the units (AMX, AVX512-BF16) it is there three times as soon.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch puts it there at run time
    before = matmul.fp32_precision
    if dtype == torch.bfloat16:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
