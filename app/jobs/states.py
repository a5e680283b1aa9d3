"""The ways between the states of a job, in one table, and how an attempt at one can end."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.schemas.jobs import TERMINAL, Outcome, Status

__all__ = ["ACTIVE", "RETRYABLE", "TERMINAL", "TRANSITIONS", "Outcome", "Status", "sources_of"]

TRANSITIONS: Mapping[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset({Status.RUNNING, Status.CANCELLED, Status.EXPIRED}),
    # Back to the queue: the lease was lost, or the worker was drained.
    Status.RUNNING: frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELLING, Status.QUEUED}),
    Status.CANCELLING: frozenset({Status.CANCELLED}),
    **{status: frozenset() for status in TERMINAL},
}

ACTIVE = frozenset({Status.RUNNING, Status.CANCELLING})
RETRYABLE = frozenset({Status.FAILED, Status.CANCELLED, Status.EXPIRED})


def sources_of(target: Status) -> frozenset[Status]:
    """The states that `target` can be reached from."""
    return frozenset(status for status, following in TRANSITIONS.items() if target in following)
