"""Token sets: packed without padding, drawn with a seed, known by their sha256."""

from __future__ import annotations

import hashlib
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from secateur.problems import ProblemError, at
from secateur.pruning.quiet import quiet_transformers
from secateur.recipes import Calibration, Perplexity


@dataclass(frozen=True, slots=True)
class TokenSet:
    """`tokens`: (sequences, sequence_length), int64. `sha256`: see `digest`."""

    dataset: str
    tokens: Tensor
    sha256: str


def tokenise(folder: Path, text: str, vocabulary: int) -> Tensor:
    """The text's tokens in one row, (tokens,), by the tokenizer in `folder`; no special tokens are added.

    Raises ProblemError `model_config_invalid` if the folder has no usable tokenizer or one for a larger vocabulary.
    """
    # malloc keeps what a thread allocates together: of a tokenizer's small pieces none is left between what stays.
    with ThreadPoolExecutor(1, "tokenizer") as thread:
        tokens = thread.submit(_tokens_of, folder, text).result()  # (tokens,)
    if len(tokens) and int(tokens.max()) >= vocabulary:
        raise ProblemError(
            "model_config_invalid",
            f"The tokenizer gives token {int(tokens.max())}; the model's vocabulary has {vocabulary}.",
        )
    return tokens


def _tokens_of(folder: Path, text: str) -> Tensor:
    with quiet_transformers():
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # the files are hostile input, and the parsers raise what they like
            raise ProblemError(
                "model_config_invalid",
                f"The model's tokenizer cannot be used: {type(error).__name__}: {error}",
                hint="The model folder needs a tokenizer.json and a tokenizer_config.json that fit the model.",
            ) from error
    return torch.tensor(ids, dtype=torch.int64)  # (tokens,)


def calibration_set(tokens: Tensor, wanted: Calibration) -> TokenSet:
    """Draw `wanted.samples` sequences from `tokens`, (tokens,).

    The text is cut into sequences that do not overlap, from an offset that the seed decides; the seed then draws among them
    without replacement. Raises ProblemError `calibration_text_too_short`.
    """
    length, generator = wanted.sequence_length, random.Random(wanted.seed)
    available = len(tokens) // length
    if available < wanted.samples:
        raise at(
            "/calibration/samples",
            "calibration_text_too_short",
            f"{wanted.samples} x {length} tokens were asked for; the calibration text of '{wanted.dataset}' has "
            f"{len(tokens)}, enough for {available} x {length}.",
            hint=f"Ask for at most {available} samples of this length, or use a larger set." if available else None,
        )
    offset = generator.randrange(len(tokens) - available * length + 1)
    sequences = tokens[offset : offset + available * length].view(available, length)  # (available, length)
    drawn = sequences[torch.tensor(generator.sample(range(available), wanted.samples))]  # (samples, length)
    return TokenSet(wanted.dataset, drawn, digest(drawn))


def evaluation_set(tokens: Tensor, wanted: Perplexity) -> TokenSet:
    """Consecutive windows of `tokens`, (tokens,), from the beginning, `wanted.max_windows` at most; a rest is left out.

    Raises ProblemError `calibration_text_too_short` if there is not one window.
    """
    length = wanted.sequence_length
    windows = min(len(tokens) // length, wanted.max_windows or len(tokens))
    if windows == 0:
        raise at(
            "/evaluation/perplexity/sequence_length",
            "calibration_text_too_short",
            f"One window has {length} tokens; the evaluation text of '{wanted.dataset}' has {len(tokens)}.",
            hint=f"Ask for windows of at most {len(tokens)} tokens, or use a larger set.",
        )
    chosen = tokens[: windows * length].view(windows, length)  # (windows, length)
    return TokenSet(wanted.dataset, chosen, digest(chosen))


def digest(tokens: Tensor) -> str:
    """sha256 of the shape of `tokens`, (sequences, sequence_length), and then its elements row by row, all as little-endian
    int32: the same text cut into other sequences is another token set."""
    shape = torch.tensor(tokens.shape)  # (2,)
    numbers = torch.cat([shape, tokens.flatten()]).to(torch.int32)  # (2 + sequences * sequence_length,)
    return hashlib.sha256(numbers.numpy().astype("<i4").tobytes()).hexdigest()
