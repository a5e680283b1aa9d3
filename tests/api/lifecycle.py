"""The life of jobs as plain Python: what the database has to agree with, whatever happens in whatever order.

Written from the documents and not from the code: one dictionary, no rows, no locks, no transactions.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime, timedelta

MAX_BARREN = 3
LARGER = {"gpu.24g": "gpu.80g", "gpu.80g": "gpu.192g"}
ENDED = {"succeeded", "failed", "cancelled", "expired"}
INFRASTRUCTURE = {"service_unavailable", "hub_unavailable", "mlflow_unavailable", "disk_full"}

Token = tuple[str, int]
"""A job's id and the attempt that a worker has of it, or believes to have."""


@dataclass
class Try:
    """One attempt."""

    begun: datetime
    over: datetime | None = None
    outcome: str | None = None


@dataclass
class Life:
    """One job."""

    id: str
    created: datetime
    queue: str
    priority: int = 0
    max_runtime: timedelta | None = None
    start_by: datetime | None = None
    status: str = "queued"
    barren: int = 0
    blocks: int = 0
    lease: datetime | None = None
    stop_by: datetime | None = None
    raised: bool = False
    error: str | None = None
    files: int = 0
    deleted: bool = False
    tries: list[Try] = field(default_factory=list)
    story: list[str] = field(default_factory=lambda: ["queued"])
    bells: int = 1

    def late(self, at: datetime) -> bool:
        return self.status == "queued" and not self.tries and self.start_by is not None and self.start_by < at

    def move(self, status: str) -> None:
        self.status = status
        self.story.append(status)

    def leave(self, status: str, outcome: str, at: datetime) -> str:
        self.tries[-1].over, self.tries[-1].outcome = at, outcome
        self.lease = self.stop_by = None
        self.bells += status == "queued"
        self.move(status)
        return status


class World:
    """All jobs."""

    def __init__(self) -> None:
        self.jobs: dict[str, Life] = {}

    def best(self, queues: Collection[str], at: datetime) -> Life | None:
        """The job that a worker of these queues has to be given."""
        waiting = [job for job in self.jobs.values() if job.status == "queued" and job.queue in queues and not job.late(at)]
        return min(waiting, key=lambda job: (-job.priority, job.created, job.id), default=None)

    def claim(self, queues: Collection[str], lease: timedelta, at: datetime) -> Token | None:
        job = self.best(queues, at)
        if job is None:
            return None
        if job.max_runtime is not None:
            run = sum(((one.over - one.begun) for one in job.tries if one.over), timedelta())
            job.stop_by = at + job.max_runtime - run
        job.tries.append(Try(at))
        job.barren += 1
        job.lease = at + lease
        job.move("running")
        return job.id, len(job.tries)

    def held(self, token: Token, *statuses: str) -> Life | None:
        """The job, if the attempt still has it and it is in one of `statuses`."""
        job = self.jobs[token[0]]
        return job if len(job.tries) == token[1] and job.status in statuses else None

    def renew(self, token: Token, lease: timedelta, at: datetime) -> str | None:
        job = self.held(token, "running", "cancelling")
        if job is None:
            return None
        job.lease = at + lease
        return job.status

    def finish_block(self, token: Token, done: int) -> bool:
        job = self.held(token, "running", "cancelling")
        if job is not None and done > job.blocks:
            job.blocks, job.barren = done, 0
        return job is not None

    def succeed(self, token: Token, at: datetime) -> str | None:
        job = self.held(token, "running")
        if job is None:
            return None
        job.files += 1
        return job.leave("succeeded", "succeeded", at)

    def fail(self, token: Token, code: str, at: datetime) -> str | None:
        job = self.held(token, "running")
        if job is None:
            return None
        if code == "out_of_memory" and not job.raised and job.queue in LARGER:
            job.queue, job.raised, job.barren = LARGER[job.queue], True, 0
            return job.leave("queued", "out_of_memory", at)
        if code in INFRASTRUCTURE and job.barren < MAX_BARREN:
            return job.leave("queued", "failed", at)
        job.error = code
        return job.leave("failed", "out_of_memory" if code == "out_of_memory" else "failed", at)

    def release(self, token: Token, at: datetime) -> str | None:
        job = self.held(token, "running")
        if job is None:
            return None
        job.barren = max(0, job.barren - 1)
        return job.leave("queued", "drained", at)

    def confirm(self, token: Token, at: datetime) -> str | None:
        job = self.held(token, "cancelling")
        return job.leave("cancelled", "cancelled", at) if job else None

    def cancel(self, job_id: str) -> bool:
        """Whether that is no error."""
        job = self.jobs[job_id]
        if job.status in {"queued", "running"}:
            job.move("cancelled" if job.status == "queued" else "cancelling")
        return job.status in {"cancelling", "cancelled"}

    def delete(self, job_id: str) -> bool:
        """Whether that is no error."""
        job = self.jobs[job_id]
        if job.status in ENDED:
            job.deleted, job.files = True, 0
        return job.deleted

    def reap(self, at: datetime) -> None:
        for job in self.jobs.values():
            if job.status in {"running", "cancelling"} and job.lease is not None and job.lease < at:
                self._lose(job, at)
        for job in self.jobs.values():
            if job.status == "running" and job.stop_by is not None and job.stop_by < at:
                job.error = "max_runtime_exceeded"
                job.leave("failed", "failed", at)
            elif job.late(at):
                job.error = "start_deadline_missed"
                job.move("expired")

    def _lose(self, job: Life, at: datetime) -> None:
        if job.status == "cancelling":
            job.leave("cancelled", "lost", at)
        elif job.barren < MAX_BARREN:
            job.leave("queued", "lost", at)
        else:
            job.error = "worker_lost"
            job.leave("failed", "lost", at)
