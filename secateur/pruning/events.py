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
        self._began: tuple[float, int] | None = None

    def stage(self, stage: Stage) -> None:
        """A stage begins; its progress is estimated from the first that is told of it."""
        self._began = None
        self._on_event({"type": "stage", "stage": stage})

    def progress(self, done: int, total: int, unit: str = "blocks") -> None:
        """`done` of `total` units of the stage are done; what is left is estimated at the pace since the first call."""
        now = time.monotonic()
        since, at_first = self._began = self._began or (now, done)
        eta = (now - since) / (done - at_first) * (total - done) if done > at_first else None
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
