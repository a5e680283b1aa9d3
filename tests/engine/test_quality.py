"""The quality benchmark: contenders become recipes, rows are kept and found again, and the docs show what was measured."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from pydantic import ValidationError

from benchmarks import protocol, quality, rows
from benchmarks.rows import Results, Row, Timing, asked_of, recipe_of
from benchmarks.tables import DOCS, table, with_tables
from secateur.recipes import Perplexity, SparseGPT


def row(contender: str, sparsity: str, perplexity: float, commit: str = "abc", products: str = "bfloat16") -> Row:
    asked = asked_of(recipe_of(contender, sparsity))
    return Row("smollm2-135m", "00", asked, {"wikitext2-sample": perplexity}, 0.5, "2026-11-22", commit, products)


def test_a_contender_is_a_method_with_settings_and_fields_of_the_recipe() -> None:
    recipe = recipe_of("sparsegpt,damping=0.1,propagate=none,calibration.samples=8", "2:4")
    assert isinstance(recipe.method, SparseGPT)
    assert (recipe.method.damping, recipe.method.block_size) == (0.1, 128)
    assert (recipe.propagate, recipe.calibration.samples, recipe.sparsity.pattern) == ("none", 8, "2:4")


def test_a_misspelt_setting_is_refused() -> None:
    with pytest.raises(ValidationError, match="dampling"):
        recipe_of("sparsegpt,dampling=0.1", "0.5")


def test_a_row_is_found_again_by_what_was_asked_and_the_newest_counts(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.jsonl")
    for each in (row("wanda", "0.5", 53.0), row("wanda", "0.6", 90.0), row("wanda", "0.5", 52.0)):
        results.append(each)
    again = Results(tmp_path / "rows.jsonl")
    found = again.find(asked_of(recipe_of("wanda,comparison=row", "0.5")), "bfloat16")  # the default, said aloud
    assert found == row("wanda", "0.5", 52.0)
    assert again.find(asked_of(recipe_of("wanda,comparison=layer", "0.5")), "bfloat16") is None


def test_a_row_is_found_though_recipes_have_a_new_field_since(tmp_path: Path) -> None:
    older = row("sparsegpt", "0.5", 44.0)
    assert older.asked
    del older.asked["method"]["block_size"]
    Results(tmp_path / "rows.jsonl").append(older)
    asked = asked_of(recipe_of("sparsegpt", "0.5"))
    assert Results(tmp_path / "rows.jsonl").find(asked, "bfloat16") == row("sparsegpt", "0.5", 44.0)


def test_rows_of_processors_that_round_otherwise_are_not_compared(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.jsonl")
    for each in (row("wanda", "0.5", 53.0), row("wanda", "0.5", 54.0, products="float32")):
        results.append(each)
    asked = asked_of(recipe_of("wanda", "0.5"))
    found = {products: results.find(asked, products) for products in ("bfloat16", "float32")}
    assert {products: each.perplexity["wikitext2-sample"] for products, each in found.items() if each} == {
        "bfloat16": 53.0,
        "float32": 54.0,
    }


def test_results_of_another_protocol_are_not_added_to(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"protocol": {"dtype": "float32"}}\n')
    with pytest.raises(ValueError, match="another protocol"):
        Results(tmp_path / "rows.jsonl")


def test_a_table_shows_multiples_of_its_first_row_and_where_it_is_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "SECONDS", tmp_path / "seconds.jsonl")
    results = Results(tmp_path / "rows.jsonl")
    for each in (row("wanda", "0.5", 50.0), row("sparsegpt", "0.5", 40.0, "def")):
        results.append(each)
    assert table(["0.5", "2:4"], [["Wanda", "wanda"], ["OBS", "sparsegpt"]], results, "bfloat16").splitlines() == [
        "|  | 50 % | 2:4 |",
        "|---|---|---|",
        "| Wanda | 50 | — |",
        "| OBS | 40 (0.800) | — |",
        "",
        "Measured 2026-11-22 by `make bench-quality` at `abc`, `def`.",
    ]


def test_a_table_shows_seconds_where_they_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = Timing(asked_of(recipe_of("sparsegpt", "0.5")), 12.0, 1.7, 3, "2026-11-22", "abc", "bfloat16")
    (tmp_path / "seconds.jsonl").write_text(json.dumps(asdict(timing)) + "\n")
    monkeypatch.setattr(rows, "SECONDS", tmp_path / "seconds.jsonl")
    lines = table(
        ["0.5"], [["Wanda", "wanda"], ["OBS", "sparsegpt"]], Results(tmp_path / "rows.jsonl"), "bfloat16"
    ).splitlines()
    assert lines[0] == "|  | 50 % | seconds |"
    assert lines[2:4] == ["| Wanda | — | 1 |", "| OBS | — | 1.70 |"]


def test_the_tables_of_the_docs_are_what_was_measured() -> None:
    results = Results()
    for page in DOCS.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert with_tables(text, results) == text, f"{page.name}: run python -m benchmarks.tables"


def test_a_row_is_measured_on_every_dataset(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "EVALUATION", Perplexity(sequence_length=32, max_windows=4))
    recipe = recipe_of("wanda,calibration.samples=4,calibration.sequence_length=16", "0.5")
    pruned = quality.measured(llama, recipe, ["wikitext2-sample", "sotu-sample"])
    dense = quality.measured(llama, None, ["wikitext2-sample"])
    assert pruned.perplexity.keys() == {"wikitext2-sample", "sotu-sample"}
    assert pruned.sparsity == 0.5
    assert dense.asked is None
    assert dense.perplexity["wikitext2-sample"] != pruned.perplexity["wikitext2-sample"]
    assert dense.model_sha256 == pruned.model_sha256
