"""The guess at when a queued job begins."""

from __future__ import annotations

from datetime import timedelta

import pytest

from app.jobs.waiting import begins_in

S = timedelta(seconds=1)


@pytest.mark.parametrize(
    ("place", "mean", "since", "workers", "seconds"),
    [
        (1, None, [], 1, 0),  # a worker is free
        (2, None, [], 1, None),  # nobody knows how long a job takes
        (1, 100, [30], 1, 70),  # what is left of the one that runs
        (3, 100, [30], 1, 270),  # and all of the two ahead
        (3, 100, [30, 50], 2, 160),  # two share that
        (1, 100, [250], 1, 0),  # the one that runs is overdue
        (1, 100, [10], 2, 0),
    ],
)
def test_guess(place: int, mean: int | None, since: list[int], workers: int, seconds: float | None) -> None:
    pace = (mean * S if mean else None, [ran * S for ran in since])
    assert begins_in(place, pace, workers) == seconds
