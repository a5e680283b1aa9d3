"""A run that evaluates: the number that a pruning run calls dense, a report, and no file."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from secateur.pruning import dense
from secateur.pruning.calibration import evaluation_set, tokenise
from secateur.pruning.datasets import read_text
from secateur.pruning.evaluation import Measured, PerplexityCache, measure, protocol
from secateur.pruning.events import Event
from secateur.pruning.job import RunResult
from secateur.pruning.pipeline import run
from secateur.recipes import Perplexity, read_recipe
from tests.engine.runs import checkpoint, prune, recipe

WANTED = {"perplexity": {"sequence_length": 32, "max_windows": 4}}


def evaluate(source: Path, into: Path, events: list[Event] | None = None, *, cache: Path | None = None) -> RunResult:
    asked = {"kind": "evaluate", "model": {"source": "local", "id": "tiny"}, "evaluation": WANTED, "dtype": "float32"}
    told = [] if events is None else events
    output = into / "output"
    return run(read_recipe(asked), source=source, output=output, cache=cache or into / "cache", on_event=told.append)


def test_it_measures_what_a_pruning_run_calls_dense(llama: Path, tmp_path: Path) -> None:
    result = evaluate(llama, tmp_path / "evaluate")
    pruned = prune(recipe("magnitude", evaluation=WANTED), llama, tmp_path / "prune")
    perplexity = result.metrics["perplexity"]
    assert perplexity["value"] == pruned.metrics["perplexity"]["dense"]
    assert perplexity["protocol"] == pruned.metrics["perplexity"]["protocol"]


def test_its_report_says_what_was_measured_of_which_model_and_there_is_no_file(llama: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    result = evaluate(llama, tmp_path, events)
    assert result.files == []
    assert result.report["perplexity"] == result.metrics["perplexity"]
    with checkpoint(llama) as source:
        assert result.report["provenance"]["model_sha256"] == source.sha256
    told = [event["done"] for event in events if event["type"] == "progress"]
    assert told == list(range(1, len(told) + 1))
    assert result.metrics["peak_memory_bytes"] > 0


def test_two_that_begin_together_measure_once(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower of the two is told to wait, and takes what the faster one found."""
    measuring, go_on = threading.Event(), threading.Event()
    measured: list[float] = []

    def slowly(*given: Any) -> Measured:
        measuring.set()
        assert go_on.wait(30)
        found = measure(*given)
        measured.append(found.perplexity)
        return found

    monkeypatch.setattr(dense, "measure", slowly)
    results: dict[str, float] = {}
    told: list[Event] = []

    def job(name: str) -> None:
        result = evaluate(llama, tmp_path / name, told if name == "second" else None, cache=tmp_path / "cache")
        results[name] = result.metrics["perplexity"]["value"]

    threads = [threading.Thread(target=job, args=(name,)) for name in ("first", "second")]
    threads[0].start()
    assert measuring.wait(30)
    threads[1].start()
    while not any(event["type"] == "log" for event in told):
        assert threads[1].is_alive()
    go_on.set()
    for thread in threads:
        thread.join()
    assert results["first"] == results["second"]
    assert len(measured) == 1


def test_what_a_dead_job_held_is_free_again(llama: Path, tmp_path: Path) -> None:
    tokens = evaluation_set(tokenise(llama, read_text("wikitext2-sample", "evaluation"), 257), Perplexity())
    known = PerplexityCache(tmp_path, "m" * 64, protocol(tokens, "bfloat16"))
    with pytest.raises(RuntimeError), known.alone(lambda: None):
        raise RuntimeError
    waited: list[bool] = []
    with known.alone(lambda: waited.append(True)):
        assert waited == []
