"""What a child has said, folded into what the database is told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.jobs.events import LogLine
from workers.messages import Message

_PROGRESS_FIELDS = ("done", "total", "unit", "eta_seconds")


def fold(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The arguments of `claims.record`, one entry a stage: its newest progress and all its log lines.

    Raises ValueError for a message of a type that is not known.
    """
    records: list[dict[str, Any]] = []
    for message in messages:
        if message["type"] == "stage" or not records:
            records.append({"stage": None, "progress": None, "logs": []})
        match message["type"]:
            case "stage":
                records[-1]["stage"] = message["stage"]
            case "progress":
                records[-1]["progress"] = {name: message[name] for name in _PROGRESS_FIELDS}
            case "log":
                records[-1]["logs"].append(LogLine(level=message["level"], message=message["message"]))
            case unknown:
                raise ValueError(f"a child sent a message of the unknown type {unknown!r}")
    return records
