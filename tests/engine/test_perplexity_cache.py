"""The dense perplexity that is computed once: found by all that it depends on, and by nothing less."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from secateur.pruning.calibration import evaluation_set
from secateur.pruning.evaluation import PerplexityCache, protocol
from secateur.recipes import Perplexity
from tests.engine.runs import prune, recipe

TOKENS = torch.arange(4096) % 50
STATED = protocol(evaluation_set(TOKENS, Perplexity(sequence_length=512, max_windows=8)), "bfloat16")


def test_it_is_found_by_model_and_protocol(tmp_path: Path) -> None:
    PerplexityCache(tmp_path, "m" * 64, STATED).put(12.5)
    assert PerplexityCache(tmp_path, "m" * 64, STATED).get() == 12.5
    assert PerplexityCache(tmp_path, "n" * 64, STATED).get() is None


@pytest.mark.parametrize("part", STATED)
def test_no_part_of_the_protocol_is_left_out(tmp_path: Path, part: str) -> None:
    PerplexityCache(tmp_path, "m" * 64, STATED).put(12.5)
    assert PerplexityCache(tmp_path, "m" * 64, STATED | {part: "another"}).get() is None


def test_the_same_text_in_other_windows_has_another_perplexity(tmp_path: Path) -> None:
    PerplexityCache(tmp_path, "m" * 64, STATED).put(12.5)
    longer = protocol(evaluation_set(TOKENS, Perplexity(sequence_length=1024, max_windows=4)), "bfloat16")
    assert PerplexityCache(tmp_path, "m" * 64, longer).get() is None


def test_another_window_length_is_measured_again(llama: Path, tmp_path: Path) -> None:
    """Through the whole run, over the same 256 tokens and in one cache."""
    dense = {
        length: prune(
            recipe("magnitude", evaluation={"perplexity": {"sequence_length": length, "max_windows": 256 // length}}),
            llama,
            tmp_path / str(length),
            cache=tmp_path / "cache",
        ).metrics["perplexity"]["dense"]
        for length in (32, 64)
    }
    assert dense[32] != dense[64]


def test_a_file_that_cannot_be_read_counts_as_absent(tmp_path: Path) -> None:
    known = PerplexityCache(tmp_path, "m" * 64, STATED)
    known.put(12.5)
    (file,) = tmp_path.iterdir()
    for broken in ("{", '{"perplexity": [1]}', '{"perplexity": "much"}'):
        file.write_text(broken)
        assert known.get() is None


def test_many_may_write_the_same_at_once(tmp_path: Path) -> None:
    def put(_: int) -> None:
        for _ in range(100):
            PerplexityCache(tmp_path, "m" * 64, STATED).put(12.5)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(put, range(4)))
    assert len(list(tmp_path.iterdir())) == 1
    assert PerplexityCache(tmp_path, "m" * 64, STATED).get() == 12.5


def test_a_cache_that_cannot_be_written_fails_no_job(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    told: list[dict[str, object]] = []
    wanted = recipe("magnitude", evaluation={"perplexity": {"sequence_length": 32, "max_windows": 2}})
    assert prune(wanted, llama, tmp_path, told, cache=tmp_path / "cache").metrics["perplexity"]["dense"] > 1
    assert any(event["type"] == "log" and event["level"] == "warning" for event in told)
