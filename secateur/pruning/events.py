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
        self._mark: tuple[float, int] | None = None
        self._warming = False

    def stage(self, stage: Stage) -> None:
        """A stage begins; its progress is estimated from the first that is told of it."""
        self._mark = None
        self._on_event({"type": "stage", "stage": stage})

    def progress(self, done: int, total: int, unit: str = "blocks") -> None:
        """`done` of `total` units of the stage are done; what is left is estimated at the pace of those before.

        The first of them also warms up what the others find warm: it counts as long as it is the only one.
        """
        now = time.monotonic()
        since, before = self._mark or (now, done)
        eta = (now - since) / (done - before) * (total - done) if done > before else None
        if self._mark is None or self._warming:
            self._warming = self._mark is None
            self._mark = (now, done)
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
