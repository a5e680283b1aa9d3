"""The task behind the doorbell: thin, for the supervisor does the work."""

from __future__ import annotations

import asyncio

from workers import drain
from workers.celery_app import app, settings
from workers.supervisor import work_once


@app.task(name="workers.tasks.work")
def work() -> int:
    """Take jobs from this worker's queues, one after another, until none is left; how many it took."""
    taken = 0
    while not drain.under_way() and asyncio.run(work_once(settings)):
        taken += 1
    return taken
