"""The faults, one function each: it is given the service and a job that is where the fault is to hit it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from benchmarks.chaos.programs import Program, children_of, command_of, eventually, parent_of, processes_of
from benchmarks.chaos.service import LEASE_SECONDS, Service, free_disk

STAGES = ("claim", "pruning", "evaluating", "packaging", "uploading")
_PAST_LEASE = LEASE_SECONDS + 3.0


@dataclass(frozen=True)
class Fault:
    """What is done, at which stages; what a client sees, and what recovers it."""

    name: str
    hit: Callable[[Service, str], None]
    stages: tuple[str, ...]
    until: str
    """What its time is taken to: the next `attempt`, an `answer` of what was hit, the job's `end`; "" if it has none."""
    seen: str
    recovered_by: str
    costs_attempt: bool = False
    alone: bool = False
    """Whether no other job may run meanwhile."""
    expected: str = "succeeded"
    answers: Callable[[Service], bool] | None = None
    """Whether what was hit answers again."""

    @property
    def is_kill_of_worker(self) -> bool:
        return self.hit in {kill_worker, kill_pool}


def supervisor_of(service: Service, job_id: str) -> int:
    """The pool process that has the job. Raises LookupError if none has, or not any more."""
    (row,) = service.rows("SELECT worker FROM jobs WHERE id = %s", job_id)
    pid = int(row["worker"].rpartition(":")[2]) if row["worker"] else 0
    if "celery" not in command_of(pid):
        raise LookupError(job_id)
    return pid


def worker_of(service: Service, job_id: str) -> Program:
    """The worker whose pool process has the job."""
    parent = parent_of(supervisor_of(service, job_id))
    return next(worker for worker in service.workers if worker.process and worker.process.pid == parent)


def child_of(service: Service, job_id: str) -> int:
    """The child (fetcher or runner) that works at the job."""
    found: list[int] = []

    def look() -> bool:
        found[:] = [pid for pid in children_of(supervisor_of(service, job_id)) if "workers." in command_of(pid)][:1]
        return bool(found)

    eventually(look, 5, "a child of the supervisor")
    return found[0]


def _kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def kill_worker(service: Service, job_id: str) -> None:
    worker_of(service, job_id).kill()


def kill_pool(service: Service, job_id: str) -> None:
    _kill(supervisor_of(service, job_id))


def kill_child(service: Service, job_id: str) -> None:
    _kill(child_of(service, job_id))


def drain_worker(service: Service, job_id: str) -> None:
    worker_of(service, job_id).send(signal.SIGTERM)


def stop_past_lease(service: Service, job_id: str) -> None:
    _freeze([supervisor_of(service, job_id)], _PAST_LEASE)


def stop_all_past_lease(service: Service, job_id: str) -> None:
    supervisor = supervisor_of(service, job_id)
    _freeze([*children_of(supervisor), supervisor], _PAST_LEASE)


def stop_for_a_moment(service: Service, job_id: str) -> None:
    _freeze([supervisor_of(service, job_id)], LEASE_SECONDS / 3)


def _freeze(pids: list[int], seconds: float) -> None:
    for pid in pids:
        _kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in pids:
        _kill(pid, signal.SIGCONT)


def kill_api(service: Service, _job_id: str) -> None:
    service.api.kill()


def kill_scheduler(service: Service, _job_id: str) -> None:
    service.scheduler.kill()


def restart_broker(service: Service, _job_id: str) -> None:
    service.broker.kill()


def broker_away(service: Service, _job_id: str) -> None:
    service.broker.away(4.0)


def restart_database(service: Service, _job_id: str) -> None:
    """Immediate shutdown: every connection breaks, and the server recovers from its log when it starts."""
    service.database.send(signal.SIGQUIT)


def database_away(service: Service, _job_id: str) -> None:
    service.database.away(LEASE_SECONDS / 2, signal.SIGQUIT)


def store_answers_503(service: Service, _job_id: str) -> None:
    service.line.refuse()
    time.sleep(4.0)
    service.line.accept()


def store_breaks_off(service: Service, _job_id: str) -> None:
    for _ in range(3):
        service.line.cut()
        time.sleep(0.2)


def fill_disk(service: Service, job_id: str) -> None:
    """Leave no room on the file system of the work folders, until an attempt has failed for want of it."""
    ballast = service.state / "ballast"
    try:
        with suppress(OSError), ballast.open("wb") as file:
            while free_disk(service):
                file.write(b"\0" * 65_536)
                file.flush()
        eventually(lambda: _failed_attempts(service, job_id), 60, "an attempt fails for want of room")
    finally:
        ballast.unlink()


def _failed_attempts(service: Service, job_id: str) -> bool:
    return bool(service.rows("SELECT 1 FROM attempts WHERE job_id = %s AND ended_at IS NOT NULL", job_id))


def kill_while_cancelling(service: Service, job_id: str) -> None:
    worker = worker_of(service, job_id)
    with service.client() as client:
        client.jobs.cancel(job_id)
    worker.kill()


def working_at(service: Service, job_id: str) -> list[int]:
    """Processes in the job's work folder."""
    return list(processes_of(service.state / "work" / job_id))


_ANEW = "the lease runs out, the reaper queues the job, the next attempt takes over what is finished"
_DOORBELL = "the relay rings again; the database knows the jobs"

_ATTEMPT_MORE = "`attempt` is one more"
_FENCED = f"{_ANEW}; the woken supervisor is fenced and ends its child"

FAULTS = (
    Fault("kill -9 of the worker", kill_worker, STAGES, "attempt", _ATTEMPT_MORE, _ANEW, costs_attempt=True),
    Fault("kill -9 of its pool process", kill_pool, STAGES, "attempt", _ATTEMPT_MORE, _ANEW, costs_attempt=True),
    Fault("kill -9 of the child", kill_child, STAGES[:4], "attempt", _ATTEMPT_MORE,
          "its supervisor gives the lease up at once; the rest as above", costs_attempt=True),
    Fault("SIGSTOP of the supervisor past its lease", stop_past_lease, ("pruning", "uploading"), "attempt", _ATTEMPT_MORE,
          _FENCED, costs_attempt=True),
    Fault("SIGSTOP of supervisor and child past the lease", stop_all_past_lease, ("pruning", "evaluating"), "attempt",
          _ATTEMPT_MORE, _FENCED, costs_attempt=True),
    Fault("SIGSTOP of the supervisor, shorter than the lease", stop_for_a_moment, ("pruning", "evaluating", "uploading"), "",
          "nothing", "the lease is renewed in time"),
    Fault("SIGTERM of the worker", drain_worker, ("pruning", "evaluating", "packaging", "uploading"), "",
          f"{_ATTEMPT_MORE}, unless the job was behind its last block",
          "the block is finished and the job queued again; behind the last block the job is finished"),
    Fault("kill -9 of the API", kill_api, ("submit", *STAGES), "answer",
          "an open request or stream breaks off; the client sends it again, with the same key or from the last event",
          "it is started again", answers=Service.api_answers),
    Fault("kill -9 of the scheduler", kill_scheduler, ("submit", "claim", "pruning", "uploading"), "", "nothing",
          "it is started again; all that its rounds do is found in the database"),
    Fault("kill -9 of the broker", restart_broker, ("submit", *STAGES), "answer", "nothing", _DOORBELL,
          answers=Service.broker_answers),
    Fault("broker away for 4 s", broker_away, ("submit", "claim", "pruning"), "answer",
          "nothing; jobs are accepted", _DOORBELL,
          answers=Service.broker_answers),
    Fault("PostgreSQL crashes and recovers", restart_database, ("submit", *STAGES), "answer",
          "perhaps a 503, which the client repeats; streams stay open", "writes are repeated within the lease",
          answers=Service.database_answers),
    Fault("PostgreSQL away for half a lease", database_away, ("submit", "pruning", "evaluating", "uploading"), "answer",
          "503, which the client repeats; streams stay open", "writes are repeated within the lease",
          answers=Service.database_answers),
    Fault("the store answers 503 for 4 s", store_answers_503, ("uploading",) * 3, "end", "a warning among the events",
          "the upload is tried again while the lease is kept"),
    Fault("connections to the store break off", store_breaks_off, ("uploading",) * 2, "end",
          "nothing, or a warning among the events", "the upload is tried again"),
    Fault("kill -9 of the worker during a cancel", kill_while_cancelling, ("pruning",) * 2, "",
          "the job is `cancelled`", "the reaper confirms the cancel when the lease runs out",
          alone=True, expected="cancelled"),
    Fault("the worker's disk is full", fill_disk, ("claim", "pruning"), "attempt", "an attempt with the outcome `failed`",
          "the job is queued again, and goes on when there is room", costs_attempt=True, alone=True),
)  # fmt: skip
