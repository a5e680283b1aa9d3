"""What training must not cost: at low rates a block is to be no worse than one that is only masked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from secateur.pruning.elastic.linear import ElasticLinear, Linears, weights_at
from secateur.pruning.elastic.reconstruction import Trained
from secateur.pruning.placed import Placed
from secateur.pruning.streaming import MicroBatch
from secateur.recipes import Band

RATE = 0.30
SEQUENCES = 8  # of the calibration set, that errors are compared on
BASE_FROZEN, LOW_BAND_OFF = "base_frozen", "low_band_off"


@dataclass(frozen=True, slots=True)
class Guarded:
    """A block's linears as they are kept. `errors`: relative squared errors at `RATE` on the dense stream, by what was
    compared; `fallbacks`: what the safeguard did."""

    linears: dict[str, ElasticLinear]
    band_errors: list[float | None]
    errors: dict[str, float]
    fallbacks: tuple[str, ...]


def guarded(
    train: Callable[[bool], Trained],
    dense: Linears,
    error: Callable[[Linears], float],
    *,
    train_base: bool,
) -> Guarded:
    """Train a block and keep what does not harm its lowest band.

    `train` is told whether to train the weights too; `error` is a block's at `RATE`. If trained weights make it larger than
    that of the `dense` ones, masked, the block is trained again with its weights as they were. If the lowest band's pair
    makes it no smaller, that band goes without (the authors' safeguard). So no block is worse than its masks alone.
    """
    fallbacks: tuple[str, ...] = ()
    masked, trained = error(dense), train(train_base)
    errors = {"masked": masked} | _compared(trained.linears, error)
    refused = min(errors["pair"], errors["no_pair"])
    if train_base and refused > masked:
        trained, fallbacks = train(False), (BASE_FROZEN,)
        errors = {"masked": masked, "base_trained": refused} | _compared(trained.linears, error)
    linears = trained.linears
    if errors["pair"] >= errors["no_pair"]:
        linears, fallbacks = _low_band_off(linears), (*fallbacks, LOW_BAND_OFF)
    return Guarded(linears, trained.errors, errors, fallbacks)


def _compared(linears: Linears, error: Callable[[Linears], float]) -> dict[str, float]:
    """The errors with the lowest band's pair and without it."""
    return {"pair": error(linears), "no_pair": error(_low_band_off(linears))}


def _low_band_off(linears: Linears) -> dict[str, ElasticLinear]:
    return {name: replace(linear, low_band=False) for name, linear in linears.items()}


def error_at(
    placed: Placed, linears: Linears, bands: Sequence[Band], rate: float, given: Sequence[tuple[MicroBatch, Tensor]]
) -> float:
    """Squared error of the block's output at a rate, relative to the squared targets. `given`: micro-batches, and what they
    are to give, (batch, seq, hidden) each."""
    outputs = placed.outputs(weights_at(linears, bands, rate, placed.lanes), [batch for batch, _ in given])
    pairs = [(output.float(), target.float()) for output, (_, target) in zip(outputs, given, strict=True)]
    lost = sum(float((output - target).square().sum()) for output, target in pairs)
    whole = sum(float(target.square().sum()) for _, target in pairs)
    return lost / whole if whole > 0 else 0.0
