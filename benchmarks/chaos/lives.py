"""One job's life under faults: it is submitted, hit where the plan says, followed by a client, and judged at its end."""

from __future__ import annotations

import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.chaos.faults import Fault
from benchmarks.chaos.programs import eventually
from benchmarks.chaos.service import LEASE_SECONDS, Service
from secateur import Client
from secateur.errors import SecateurError, UnreachableError
from secateur.pruning.report import REPORT
from secateur.schemas.jobs import TERMINAL

RECIPE: dict[str, Any] = {
    "kind": "prune",
    "model": {"source": "local", "id": "tiny"},
    "method": {"name": "wanda"},
    "sparsity": {"target": 0.5},
    "calibration": {"samples": 64, "sequence_length": 128},
    "evaluation": {"perplexity": {"sequence_length": 128, "max_windows": 64}},
}
JOB_SECONDS = 240.0


@dataclass
class Hit:
    """A fault at a stage; when it hit, which attempt had the job, and what came of it."""

    fault: Fault
    stage: str
    at: float | None = None
    attempt: int = 0
    seconds: float | None = None
    """Until the service answered again, or another attempt had begun: as the fault's kind has it."""


@dataclass
class Life:
    """A job that is to live through `hits`, in this order, and to end as `expected`."""

    hits: list[Hit]
    expected: str = "succeeded"
    job_id: str = ""
    status: str = ""
    seen: list[int] = field(default_factory=list)
    """Numbers of the events that a client saw on its stream."""
    wrong: list[str] = field(default_factory=list)
    weights: dict[str, str] = field(default_factory=dict)


def live(service: Service, life: Life) -> None:
    """See the job through; what was wrong is in `life` afterwards."""
    with service.client() as client:
        _submit(service, client, life)
        follower = threading.Thread(target=_follow, args=(service, life))
        follower.start()
        for hit in life.hits:
            if hit.stage != "submit":
                _hit(service, life, hit)
        try:
            eventually(lambda: _look(service, life)["status"] in TERMINAL, JOB_SECONDS, "the job ends")
        except TimeoutError as late:
            life.wrong.append(str(late))
        follower.join(30)
        _judge(service, client, life)
    for hit in life.hits:
        _measure_recovery(service, life, hit)


def _submit(service: Service, client: Client, life: Life) -> None:
    """Send the job while the faults of the stage `submit` hit; the same request again until it is answered."""
    key = str(uuid.uuid4())
    blows = [threading.Thread(target=_strike, args=(service, "", hit)) for hit in life.hits if hit.stage == "submit"]
    for blow in blows:
        blow.start()
    deadline = time.monotonic() + 60
    while not life.job_id:
        try:
            life.job_id = client.jobs.create({**RECIPE, "metadata": {"life": key}}, idempotency_key=key).id
        except SecateurError:
            if time.monotonic() > deadline:
                raise
    for blow in blows:
        blow.join()
    for hit in life.hits:
        _await_answer(service, hit)
    if len(service.rows("SELECT id FROM jobs WHERE labels ->> 'life' = %s", key)) != 1:
        life.wrong.append("one request made several jobs")


def _follow(service: Service, life: Life) -> None:
    with service.client() as client:
        try:
            life.seen.extend(event.seq for event in client.jobs.stream_events(life.job_id))
        except SecateurError as error:
            life.wrong.append(f"the stream of events gave up: {error}")


def _hit(service: Service, life: Life, hit: Hit) -> None:
    """Wait for the stage and strike. If the job is over by then, or moves on meanwhile, there was no fault."""
    before = max((earlier.attempt for earlier in life.hits if earlier.at and earlier.fault.costs_attempt), default=0)
    with ExitStack() as held:
        if hit.stage == "uploading" and _arrives(service, life, "nearly uploading", before):
            held.enter_context(service.line.held())
        if _arrives(service, life, hit.stage, before):
            hit.attempt = _look(service, life)["attempt"]
            _strike(service, life.job_id, hit)
    _await_answer(service, hit)


def _strike(service: Service, job_id: str, hit: Hit) -> None:
    at = time.time()
    try:
        hit.fault.hit(service, job_id)
    except (LookupError, StopIteration, TimeoutError):
        return
    hit.at = at


def _await_answer(service: Service, hit: Hit) -> None:
    if hit.at is not None and hit.fault.answers:
        time.sleep(0.1)  # what was told to stop may answer for another moment
        eventually(partial(hit.fault.answers, service), 60, "what was hit answers")
        hit.seconds = time.time() - hit.at


def _look(service: Service, life: Life) -> dict[str, Any]:
    (row,) = service.rows("SELECT status, stage, progress, attempt FROM jobs WHERE id = %s", life.job_id)
    return row


def _arrives(service: Service, life: Life, stage: str, before: int) -> bool:
    """Wait until an attempt behind number `before` is at `stage`; False if the job ends without."""
    at: dict[str, Callable[[dict[str, Any]], bool]] = {
        "claim": lambda _: True,
        "pruning": lambda row: row["stage"] == "pruning" and row["progress"] is not None and row["progress"]["done"] >= 2,
        "evaluating": lambda row: row["stage"] == "evaluating",
        "packaging": lambda row: (_folder(service, life, row) / "output" / REPORT).exists(),
        "nearly uploading": lambda row: before > 0 or row["stage"] in {"evaluating", "packaging", "uploading"},
        "uploading": lambda row: row["stage"] == "uploading",
    }
    deadline = time.monotonic() + JOB_SECONDS
    while time.monotonic() < deadline:
        row = _look(service, life)
        if row["status"] in TERMINAL:
            return False
        if row["status"] == "running" and row["attempt"] > before and at[stage](row):
            return True
        time.sleep(0.01)
    return False


def _folder(service: Service, life: Life, row: dict[str, Any]) -> Path:
    return service.state / "work" / life.job_id / str(row["attempt"])


def _judge(service: Service, client: Client, life: Life) -> None:
    life.status = _look(service, life)["status"]
    if life.status != life.expected:
        (row,) = service.rows("SELECT error FROM jobs WHERE id = %s", life.job_id)
        life.wrong.append(f"ended as {life.status} and not as {life.expected}: {row['error']}")
    known = [row["seq"] for row in service.rows("SELECT seq FROM events WHERE job_id = %s ORDER BY seq", life.job_id)]
    if known != list(range(1, len(known) + 1)):
        life.wrong.append("the events have gaps")
    if life.seen != known:
        life.wrong.append(f"a client saw {len(life.seen)} events of {len(known)}")
    if life.status == "succeeded":
        eventually(partial(_downloads, client, life), 60, "the model is downloaded")


def _downloads(client: Client, life: Life) -> bool:
    """Bring the model home, which checks every digest; False if the service is just away."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            client.jobs.download(life.job_id, folder)
        files = client.jobs.artifacts(life.job_id)
    except UnreachableError:
        return False
    life.weights = {file.name: file.sha256 for file in files if file.name.endswith(".safetensors")}
    return True


def _measure_recovery(service: Service, life: Life, hit: Hit) -> None:
    if hit.at is None:
        return
    if hit.fault.until == "attempt":
        what = "started_at)::float8 AS at FROM attempts WHERE job_id = %s AND number > %s ORDER BY number"
        later = service.rows(f"SELECT extract(epoch FROM {what}", life.job_id, hit.attempt)
    elif hit.fault.until == "end":
        later = service.rows("SELECT extract(epoch FROM finished_at)::float8 AS at FROM jobs WHERE id = %s", life.job_id)
    else:
        return
    if later:
        hit.seconds = later[0]["at"] - hit.at


def successes(service: Service, job_id: str) -> int:
    """How many attempts have succeeded, by their rows and by the events: the larger number."""
    (attempts,) = service.rows("SELECT count(*) AS n FROM attempts WHERE job_id = %s AND outcome = 'succeeded'", job_id)
    (events,) = service.rows(
        "SELECT count(*) AS n FROM events WHERE job_id = %s AND type = 'status' AND data ->> 'status' = 'succeeded'", job_id
    )
    return max(int(attempts["n"]), int(events["n"]))


def leases(seconds: Sequence[float]) -> list[float]:
    """Seconds as multiples of the lease, sorted."""
    return sorted(value / LEASE_SECONDS for value in seconds)
