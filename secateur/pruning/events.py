"""What a run tells while it runs: small JSON-able objects."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

Event = dict[str, Any]
OnEvent = Callable[[Event], None]
Stage = Literal["calibrating", "pruning", "evaluating", "packaging"]


class Narrator:
    """Makes events of what happens: the stage, progress with an estimate of what is left, and log lines."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._started = time.monotonic()

    def stage(self, stage: Stage) -> None:
        """A stage begins; its progress is estimated from here."""
        self._started = time.monotonic()
        self._on_event({"type": "stage", "stage": stage})

    def progress(self, done: int, total: int, unit: str = "blocks") -> None:
        """`done` of `total` units of the stage are done, at the pace of those so far."""
        eta = (time.monotonic() - self._started) / done * (total - done) if done else None
        self._on_event(
            {
                "type": "progress",
                "done": done,
                "total": total,
                "unit": unit,
                "eta_seconds": None if eta is None else round(eta, 1),
            }
        )

    def log(self, message: str, level: Literal["info", "warning"] = "info") -> None:
        """A line for the job's log."""
        self._on_event({"type": "log", "level": level, "message": message})
