"""Perplexity by a stated protocol, streamed block by block like everything else."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkstemp

import torch
from torch import Tensor

from secateur.problems import ProblemError
from secateur.pruning.calibration import TokenSet
from secateur.pruning.streaming import MicroBatch, StreamedModel, forward

PROTOCOL_VERSION = 3  # raise it when the same model and tokens would give another number
LOGITS_AT_ONCE = 1 << 23  # elements of a float32 slice of the logits: 32 MiB


@dataclass(frozen=True, slots=True)
class Measured:
    """A perplexity, the seconds it took, and those that the blocks' forward took per token."""

    perplexity: float
    seconds: float
    block_seconds_per_token: float


def measure(model: StreamedModel, windows: Tensor, on_block: Callable[[int], None]) -> Measured:
    """Perplexity: exp of the mean negative log-likelihood of each token given those before it in its window.

    A window's first token is given, not predicted. `windows`: (windows, sequence_length). `on_block` is told the number of
    blocks that are done. Raises ProblemError `nonfinite_activation`.
    """
    started = time.monotonic()
    batches = model.batches(windows)
    model.release()
    blocks_began = time.monotonic()
    for index in range(model.count):
        with model.block(index) as block:
            forward(block, index, batches, model.lanes)
        on_block(index + 1)
    per_token = (time.monotonic() - blocks_began) / windows.numel()
    loss = sum(_loss(model, batch) for batch in batches)
    predicted = windows.shape[0] * (windows.shape[1] - 1)
    if not math.isfinite(loss):
        raise ProblemError("nonfinite_activation", "The model's output on the evaluation text is not finite.")
    value = math.exp(min(loss / predicted, 700.0))  # e^709 is more than a float holds
    return Measured(value, time.monotonic() - started, per_token)


def _loss(model: StreamedModel, batch: MicroBatch) -> float:
    """Sum of the negative log-likelihoods of a micro-batch."""
    hidden = model.leave(batch)[:, :-1].flatten(0, 1)  # (batch * (seq - 1), hidden)
    targets = batch.tokens[:, 1:].flatten().to(hidden.device)  # (batch * (seq - 1),)
    vocabulary = model.model.get_output_embeddings().weight.shape[0]
    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    total = 0.0
    for part, expected in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
        logits = model.logits(part).float()  # (rows, vocabulary)
        top = logits.amax(dim=1, keepdim=True)  # (rows, 1)
        total -= float((logits.gather(1, expected.unsqueeze(1)) - top).double().sum())
        # in place: half the time of torch's cross_entropy, which makes two more matrices of this size
        total += float(logits.sub_(top).exp_().sum(dim=1).log_().double().sum())
    return total


def protocol(tokens: TokenSet, dtype: str) -> dict[str, str | int]:
    """All that a perplexity depends on beside the model."""
    windows, length = tokens.tokens.shape
    return {
        "dataset": tokens.dataset,
        "sequence_length": length,
        "windows": windows,
        "tokens": windows * (length - 1),
        "dtype": dtype,
        "token_sha256": tokens.sha256,
    }


class PerplexityCache:
    """Perplexities of dense models in a folder, by model digest and stated protocol: each is computed once."""

    def __init__(self, folder: Path, model_digest: str, stated: Mapping[str, str | int]) -> None:
        key = json.dumps({"model": model_digest, "version": PROTOCOL_VERSION, **stated}, sort_keys=True)
        self._file = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

    def get(self) -> float | None:
        """The perplexity if it is known; a file that cannot be read counts as absent."""
        try:
            return float(json.loads(self._file.read_text())["perplexity"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @contextmanager
    def alone(self, on_wait: Callable[[], None]) -> Iterator[None]:
        """Keep others from computing the same meanwhile: `on_wait` is told if somebody does, and then they are waited for.

        Whoever dies lets go. Raises OSError if the folder cannot be written.
        """
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.with_suffix(".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def put(self, value: float) -> None:
        """Keep `value`; the file appears whole or not at all, also when others write the same. Raises OSError."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = mkstemp(dir=self._file.parent, suffix=".partial")
        partial = Path(name)
        try:
            with os.fdopen(descriptor, "w") as file:
                json.dump({"perplexity": value}, file)
            partial.rename(self._file)
        finally:
            partial.unlink(missing_ok=True)  # it is still there if something went wrong
