"""Token sets: packed, disjoint, seeded and known by their digest."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest
import torch

from secateur.problems import ProblemError
from secateur.pruning.calibration import calibration_set, digest, evaluation_set, tokenise
from secateur.recipes import Calibration, Perplexity

TOKENS = torch.arange(1000)


def test_sequences_are_pieces_of_the_text_that_do_not_overlap() -> None:
    drawn = calibration_set(TOKENS, Calibration(samples=90, sequence_length=11, seed=3)).tokens
    assert drawn.shape == (90, 11)
    assert bool((drawn.diff(dim=1) == 1).all())
    assert len(set(drawn.flatten().tolist())) == drawn.numel()


def test_the_seed_decides() -> None:
    sets = [calibration_set(TOKENS, Calibration(samples=5, sequence_length=16, seed=seed)) for seed in (0, 0, 1, 2**63 - 1)]
    assert sets[0].sha256 == sets[1].sha256
    assert len({each.sha256 for each in sets}) == 3


def test_a_text_that_is_too_short_says_what_it_is_enough_for() -> None:
    with pytest.raises(ProblemError, match=r"has 1000, enough for 62 x 16") as caught:
        calibration_set(TOKENS, Calibration(samples=63, sequence_length=16))
    assert [fault.pointer for fault in caught.value.faults] == ["/calibration/samples"]
    with pytest.raises(ProblemError) as caught:
        evaluation_set(TOKENS, Perplexity(sequence_length=1001))
    assert caught.value.code == "calibration_text_too_short"


def test_windows_are_consecutive_from_the_beginning() -> None:
    assert torch.equal(evaluation_set(TOKENS, Perplexity(sequence_length=300)).tokens.flatten(), TOKENS[:900])
    assert torch.equal(evaluation_set(TOKENS, Perplexity(sequence_length=300, max_windows=2)).tokens.flatten(), TOKENS[:600])


def test_the_digest_is_of_shape_and_tokens_as_little_endian_int32() -> None:
    tokens = torch.tensor([[1, 2, 3], [70_000, 4, 5]])
    assert digest(tokens) == hashlib.sha256(struct.pack("<8i", 2, 3, 1, 2, 3, 70_000, 4, 5)).hexdigest()


def test_the_same_text_in_other_windows_is_another_token_set() -> None:
    short = evaluation_set(TOKENS, Perplexity(sequence_length=50, max_windows=8))
    long = evaluation_set(TOKENS, Perplexity(sequence_length=100, max_windows=4))
    assert torch.equal(short.tokens.flatten(), long.tokens.flatten())
    assert short.sha256 != long.sha256


def test_a_tokenizer_that_is_broken_or_too_large_is_the_models_fault(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match="token 220") as caught:
        tokenise(llama, "Garden shears", 100)
    assert caught.value.code == "model_config_invalid"
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(ProblemError) as caught:
        tokenise(tmp_path, "Garden shears", 100)
    assert caught.value.code == "model_config_invalid"
