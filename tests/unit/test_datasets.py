"""The texts that ship, and how they are split."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.problems import ProblemError
from secateur.pruning.datasets import articles, fetch_texts, known_bytes, read_text, wanted_texts
from tests.unit.test_admission import recipe


def test_calibration_and_evaluation_share_no_article() -> None:
    calibration, evaluation = (articles(read_text("wikitext2-sample", role)) for role in ("calibration", "evaluation"))
    assert (len(calibration), len(evaluation)) == (40, 20)
    assert not set(calibration) & set(evaluation)
    assert calibration[0].startswith(" = Homarus gammarus = \n")


def test_a_heading_inside_an_article_does_not_end_it() -> None:
    text = " = One = \n\n body \n = = Section = = \n more \n = Two = \n body \n"
    assert articles(text) == [" = One = \n\n body \n = = Section = = \n more \n", " = Two = \n body \n"]


def test_known_lengths_are_the_texts_lengths() -> None:
    assert known_bytes("wikitext2-sample", "evaluation") == len(read_text("wikitext2-sample", "evaluation").encode())
    assert known_bytes("wikitext2", "evaluation") is None


def test_a_text_that_was_not_fetched_is_a_problem_and_one_that_was_is_read(tmp_path: Path) -> None:
    with pytest.raises(ProblemError) as caught:
        read_text("c4", "calibration", tmp_path)
    assert caught.value.code == "dataset_unavailable"
    (tmp_path / "c4.calibration.txt").write_text("öffentlich", encoding="utf-8")
    assert read_text("c4", "calibration", tmp_path) == "öffentlich"


def test_samples_are_not_fetched(tmp_path: Path) -> None:
    fetch_texts(recipe(), tmp_path / "texts")
    assert not (tmp_path / "texts").exists()


def test_only_what_the_run_reads_is_wanted() -> None:
    assert wanted_texts(recipe(method={"name": "magnitude"})) == []
    asked = recipe(evaluation={"perplexity": {"dataset": "c4"}})
    assert wanted_texts(asked) == [("wikitext2-sample", "calibration"), ("c4", "evaluation")]
