"""What a method may know of a linear's inputs, accumulated micro-batch by micro-batch: norms, moments, or the Gram."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from secateur.pruning.memory import trim
from secateur.pruning.registry import Observes

ELEMENTS_IN_CACHE = 3 << 16  # of float32, beside what they are made of
TOKENS_AT_ONCE = 2048  # that a Gram takes in with one product for each strip
STRIP = 512  # rows of the Gram that are one matrix product
LARGE_BYTES = 8 << 20  # of a Gram, for which room is made: with its factor it is the most that a block needs at a time


class Statistics(Protocol):
    """An accumulator over the inputs of a linear."""

    def add(self, inputs: Tensor) -> None:
        """Take in `inputs`, (…, in_features); every leading axis is a token."""

    @property
    def count(self) -> int:
        """Number of tokens taken in."""

    @property
    def squares(self) -> Tensor:
        """Sum over tokens of each input's square, (in_features,)."""


class InputNorms:
    """The sum of squares of each input; a vector is all that is ever held."""

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.count = 0
        self._squares = torch.zeros(in_features, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor) -> None:
        for wide in _widened(inputs):
            self._squares += wide.square_().sum(dim=0)
            self.count += len(wide)

    def merge(self, other: InputNorms) -> None:
        """Take in what `other` has taken in."""
        self._squares += other._squares
        self.count += other.count

    @property
    def squares(self) -> Tensor:
        return self._squares


class InputMoments:
    """The mean and the variance of each input, in float64.

    Deviations are from each part's own mean, and parts are joined as Chan, Golub and LeVeque do (1979, updating formulae for
    variances): nothing is lost to cancellation, however far the mean is from zero.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.count = 0
        self._mean = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._deviations = torch.zeros_like(self._mean)  # sum of squared deviations from the mean, (in_features,)

    def add(self, inputs: Tensor) -> None:
        for wide in _widened(inputs):
            mean = wide.mean(dim=0)  # (in_features,)
            self._join(len(wide), mean.double(), wide.sub_(mean).square_().sum(dim=0))

    def merge(self, other: InputMoments) -> None:
        """Take in what `other` has taken in."""
        self._join(other.count, other._mean, other._deviations)

    def _join(self, new: int, mean: Tensor, deviations: Tensor) -> None:
        if not new:
            return
        before, self.count = self.count, self.count + new
        step = mean - self._mean
        self._mean += step * (new / self.count)
        self._deviations += deviations + step.square() * (before * new / self.count)

    @property
    def mean(self) -> Tensor:
        """Mean over tokens of each input, (in_features,)."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """Mean over tokens of each input's squared deviation from its mean (divided by their number), (in_features,)."""
        return self._deviations / max(self.count, 1)

    @property
    def squares(self) -> Tensor:
        return self._deviations + self.count * self._mean.square()


class Gram:
    """The raw sum over tokens of x xT, (in_features, in_features), in float32. Nothing is scaled on the way.

    The matrix is symmetric: only its lower triangle is accumulated, in strips of rows, and mirrored when it is read. There
    is never a second one: a caller of `total` that needs no more of this object may overwrite it.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self.count = 0
        if device.type == "cpu" and torch.float32.itemsize * in_features**2 >= LARGE_BYTES:
            trim()
        self._lower = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def add(self, inputs: Tensor) -> None:
        self.add_all([inputs])

    def add_all(self, inputs: Sequence[Tensor]) -> None:
        """Take in all of `inputs`, (…, in_features) each, `TOKENS_AT_ONCE` tokens at a time however they come."""
        for parts in _of_equal_size(inputs, TOKENS_AT_ONCE):
            count = sum(map(len, parts))
            wide = _scratch(len(self._lower), self._lower.device)[:count]  # (tokens, in_features)
            for place, part in zip(torch.split(wide, [len(part) for part in parts]), parts, strict=True):
                place.copy_(part)
            with exact_products_of(parts[0].dtype):
                for start in range(0, len(self._lower), STRIP):
                    end = min(start + STRIP, len(self._lower))
                    self._lower[start:end, :end].addmm_(wide[:, start:end].T, wide[:, :end])  # (strip, end)
            self.count += count

    @property
    def total(self) -> Tensor:
        """The whole matrix, (in_features, in_features)."""
        if self._lower.nbytes >= LARGE_BYTES:
            _scratch.cache_clear()  # its factor needs the room
        for start in range(STRIP, len(self._lower), STRIP):
            strip = self._lower[start : start + STRIP, :start]  # (strip, start)
            self._lower[:start, start : start + STRIP] = strip.T
        return self._lower

    @property
    def squares(self) -> Tensor:
        return self._lower.diagonal()


Glimpse = InputNorms | InputMoments | Tensor


class InputSample:
    """The inputs of some tokens, as they came. `chosen`: which, in the order in which tokens are added, (tokens,), bool."""

    def __init__(self, chosen: Tensor) -> None:
        self._chosen, self._count = chosen, 0
        self._parts: list[Tensor] = []

    def add(self, inputs: Tensor) -> None:
        """Take in `inputs`, (…, in_features)."""
        tokens = inputs.flatten(0, -2)  # (tokens, in_features)
        self._parts.append(tokens[self._chosen[self._count : self._count + len(tokens)]])
        self._count += len(tokens)

    @property
    def inputs(self) -> Tensor:
        """(chosen tokens, in_features)."""
        return torch.cat(self._parts)


def chosen_tokens(count: int, share: float, seed: int) -> Tensor:
    """A seeded choice of ceil(`share` x `count`) of `count` tokens, (count,), bool."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order < math.ceil(share * count)


def observer(observes: Observes, in_features: int, device: torch.device) -> Statistics:
    """An empty accumulator of the kind that a method declares."""
    if observes == "gram":
        return Gram(in_features, device)
    return InputMoments(in_features, device) if observes == "moments" else InputNorms(in_features, device)


def glimpse(observes: Observes, inputs: Tensor) -> Glimpse:
    """What is taken in of a micro-batch's `inputs`, (…, in_features): a vector or two or, for a Gram, the inputs.

    Vectors are to be made in the micro-batch's lane, while its core has the inputs in its cache. There is only one Gram,
    which all cores make together.
    """
    if observes == "gram":
        return inputs
    alone = (InputMoments if observes == "moments" else InputNorms)(inputs.shape[-1], inputs.device)
    alone.add(inputs)
    return alone


def observe(statistics: Statistics, glimpses: Sequence[Glimpse]) -> None:
    """Take in what was seen of micro-batches, in order: glimpses of the kind of `statistics`."""
    if isinstance(statistics, InputNorms | InputMoments):
        for seen in glimpses:
            statistics.merge(cast("Any", seen))
    else:
        cast("Gram", statistics).add_all(cast("Sequence[Tensor]", glimpses))


def _of_equal_size(inputs: Sequence[Tensor], tokens: int) -> Iterator[list[Tensor]]:
    """`inputs`, (…, in_features) each, in order, as lists of (some tokens, in_features) that have `tokens` tokens together;
    the last has what is left."""
    waiting: list[Tensor] = []
    missing = tokens
    for part in (each.flatten(0, -2) for each in inputs):  # (its tokens, in_features)
        rest = part
        while len(rest):
            piece, rest = rest[:missing], rest[missing:]
            waiting.append(piece)
            missing -= len(piece)
            if not missing:
                yield waiting
                waiting, missing = [], tokens
    if waiting:
        yield waiting


@lru_cache(maxsize=1)
def _scratch(in_features: int, device: torch.device) -> Tensor:
    """A float32 buffer, (`TOKENS_AT_ONCE`, in_features), that tokens are widened into, of one Gram after the other if they
    are not large: new pages each time would cost half as much as the product."""
    return torch.empty(TOKENS_AT_ONCE, in_features, dtype=torch.float32, device=device)


def _widened(inputs: Tensor) -> Iterator[Tensor]:
    """Copies of `inputs`, (…, in_features), in float32, in parts of (tokens, in_features) that a core's cache holds."""
    for tokens in torch.split(inputs.flatten(0, -2), max(1, ELEMENTS_IN_CACHE // inputs.shape[-1])):
        yield tokens.to(torch.float32, copy=True)  # (tokens, in_features)


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
