"""Which workers are there, and which queues they serve: asked over the broker by the scheduler, kept for the API to tell.

A job that waits for a queue that nobody serves is not lost, but its owner has to be told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.jobs.models import Worker

# A worker that did not answer for so long is gone. It may miss an answer while its machine is busy.
GONE_AFTER = timedelta(seconds=45)


async def note(session: AsyncSession, answers: Mapping[str, Sequence[str]], *, at: datetime) -> None:
    """Write down which workers have answered, with their queues; those that are gone are forgotten."""
    for name, queues in answers.items():
        await session.merge(Worker(name=name, queues=sorted(queues), seen_at=at))
    await session.merge(Worker(name=_LOOK, queues=[], seen_at=at))
    await session.execute(delete(Worker).where(Worker.seen_at < at - GONE_AFTER))


async def workers_by_queue(session: AsyncSession, *, at: datetime) -> Counter[str] | None:
    """How many workers serve each queue; None if nobody has looked lately, as while the broker is away."""
    rows = (await session.scalars(select(Worker).where(Worker.seen_at >= at - GONE_AFTER))).all()
    if not rows:
        return None
    return Counter(queue for row in rows for queue in row.queues)


# The row that says when the scheduler has looked, whoever answered: no worker has an empty name.
_LOOK = ""
