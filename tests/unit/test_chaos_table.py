"""What docs/operations.md says of faults is what the last run of `make chaos` found, and that run found nothing wrong."""

from __future__ import annotations

import json

import pytest

from benchmarks.chaos.table import PAGE, RESULTS, with_table


def test_the_table_is_that_of_the_results() -> None:
    page = PAGE.read_text()
    assert with_table(page, json.loads(RESULTS.read_text())) == page


@pytest.mark.parametrize("count", ["wrong_states", "duplicate_successes", "orphans", "children_left", "wrong"])
def test_the_committed_run_found_nothing_wrong(count: str) -> None:
    assert not json.loads(RESULTS.read_text())[count]


def test_the_committed_run_was_a_whole_one() -> None:
    results = json.loads(RESULTS.read_text())
    assert results["faults"] >= 60
    assert results["jobs"] >= 20
