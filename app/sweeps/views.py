"""A sweep as the API shows it, made from its row and those of its jobs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.jobs.models import Job
from app.jobs.states import TERMINAL, Status
from app.sweeps.models import Sweep
from secateur.schemas import sweeps as schemas

# Of several states of jobs, the first that one of them is in is the sweep's.
_ENDS = (Status.FAILED, Status.EXPIRED, Status.CANCELLED, Status.SUCCEEDED)
_SHOWN = {Status.EXPIRED: Status.FAILED}


def show(sweep: Sweep, jobs: Sequence[Job]) -> schemas.Sweep:
    """The sweep with its progress and table."""
    ended = [job for job in jobs if job.status in TERMINAL]
    finished = [job.finished_at for job in ended if job.finished_at]
    return schemas.Sweep.model_validate({
        "id": sweep.id,
        "status": _status(jobs),
        "progress": {"done": len(ended), "total": len(jobs)},
        "recipe": sweep.recipe,
        "table": [_row(job) for job in jobs],
        "created_at": sweep.created_at,
        "finished_at": max(finished) if len(finished) == len(jobs) else None,
    })  # fmt: skip


def _status(jobs: Sequence[Job]) -> Status:
    there = {Status(job.status) for job in jobs}
    if there <= TERMINAL:
        first = next(status for status in _ENDS if status in there)
        return _SHOWN.get(first, first)
    if Status.CANCELLING in there and Status.QUEUED not in there and Status.RUNNING not in there:
        return Status.CANCELLING
    return Status.QUEUED if there == {Status.QUEUED} else Status.RUNNING


def _row(job: Job) -> dict[str, Any]:
    metrics, sparsity = job.metrics or {}, job.recipe["sparsity"]
    perplexity = metrics.get("perplexity") or {}
    return {
        "job_id": job.id,
        "method": job.recipe["method"],
        "pattern": sparsity["pattern"],
        "target": sparsity["target"],
        "status": job.status,
        "repository": job.repository,
        "sparsity": metrics.get("sparsity"),
        "perplexity_dense": perplexity.get("dense"),
        "perplexity_pruned": perplexity.get("pruned"),
        "seconds": (metrics.get("seconds") or {}).get("total"),
    }
