"""What a method may know of a linear's inputs, accumulated micro-batch by micro-batch: norms, or the Gram matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from secateur.pruning.registry import Observes


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
        tokens = inputs.flatten(0, -2).float()  # (tokens, in_features)
        self._squares += torch.linalg.vector_norm(tokens, dim=0).double().square()

    @property
    def squares(self) -> Tensor:
        return self._squares


class Gram:
    """The raw sum over tokens of x xT, (in_features, in_features), in float32. Nothing is scaled on the way."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.total = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def add(self, inputs: Tensor) -> None:
        tokens = inputs.flatten(0, -2)  # (tokens, in_features)
        with _exact_products_of(tokens.dtype):
            wide = tokens.float()
            self.total.addmm_(wide.T, wide)

    @property
    def squares(self) -> Tensor:
        return self.total.diagonal()


def observer(observes: Observes, in_features: int, device: torch.device) -> Statistics:
    """An empty accumulator of the kind that a method declares."""
    return Gram(in_features, device) if observes == "gram" else InputNorms(in_features, device)


@contextmanager
def _exact_products_of(dtype: torch.dtype) -> Iterator[None]:
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
