"""What is told of the time that is left, on a clock of the test's own."""

from __future__ import annotations

import pytest

from secateur.pruning.events import Narrator


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("secateur.pruning.events.time.monotonic", lambda: now[0])
    return now


def tell(clock: list[float], seconds: list[float], *, first: int = 0) -> list[float | None]:
    """The estimates after each block, if blocks take so many seconds; the last block is number len(seconds)."""
    told: list[float | None] = []
    narrator = Narrator(lambda event: told.append(event["eta_seconds"]) if event["type"] == "progress" else None)
    narrator.stage("pruning")
    narrator.progress(first, len(seconds))
    for number in range(first, len(seconds)):
        clock[0] += seconds[number]
        narrator.progress(number + 1, len(seconds))
    return told


def test_the_first_block_gives_the_first_estimate(clock: list[float]) -> None:
    assert tell(clock, [2.0] * 5) == [None, 8.0, 6.0, 4.0, 2.0, 0.0]


def test_a_slow_first_block_is_forgotten_once_there_is_a_second(clock: list[float]) -> None:
    assert tell(clock, [10.0, 2.0, 2.0, 2.0, 2.0]) == [None, 40.0, 6.0, 4.0, 2.0, 0.0]


def test_blocks_that_an_earlier_attempt_finished_do_not_count(clock: list[float]) -> None:
    assert tell(clock, [2.0] * 6, first=3) == [None, 4.0, 2.0, 0.0]


def test_a_stage_has_its_own_pace(clock: list[float]) -> None:
    told: list[float | None] = []
    narrator = Narrator(lambda event: told.append(event.get("eta_seconds")))
    for seconds in (10.0, 1.0):
        narrator.stage("pruning")
        narrator.progress(0, 2)
        clock[0] += seconds
        narrator.progress(1, 2)
    assert [one for one in told if one] == [10.0, 1.0]
