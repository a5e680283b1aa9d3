"""How a child's messages become what the database is told."""

from __future__ import annotations

import pytest

from workers.updates import fold


def progress(done: int) -> dict[str, object]:
    return {"type": "progress", "done": done, "total": 4, "unit": "blocks", "eta_seconds": 1.5}


def test_newest_progress_of_each_stage_is_kept_and_every_log_line() -> None:
    records = fold(
        [
            {"type": "log", "level": "info", "message": "before any stage"},
            {"type": "stage", "stage": "pruning"},
            progress(1),
            {"type": "log", "level": "warning", "message": "damping raised"},
            progress(2),
            {"type": "stage", "stage": "evaluating"},
        ]
    )
    assert [record["stage"] for record in records] == [None, "pruning", "evaluating"]
    assert [record["progress"] and record["progress"]["done"] for record in records] == [None, 2, None]
    assert [line.message for record in records for line in record["logs"]] == ["before any stage", "damping raised"]


def test_nothing_said_is_nothing_to_write() -> None:
    assert fold([]) == []


def test_unknown_message_is_an_error() -> None:
    with pytest.raises(ValueError, match="riddle"):
        fold([{"type": "riddle"}])
