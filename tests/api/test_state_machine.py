"""Random interleavings of all that can happen to jobs, on both databases, against the plain model in `lifecycle.py`.

Every attempt that was ever given out goes on writing, so many writers are zombies. Time is the test's own.
`make state-machine` does 2 000 runs on each database; here are a few.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.models import Tenant
from app.artifacts.models import Artifact
from app.jobs import claims, idempotency, retention, service
from app.jobs.claims import NewArtifact
from app.jobs.models import Attempt, Event, Job, OutboxMessage
from app.jobs.reaper import reap
from app.jobs.states import Status
from app.kit.db import Database
from secateur.problems import ProblemError
from secateur.recipes import PruneRecipe
from tests.api.jobs import body, forget_jobs, make_tenant
from tests.api.lifecycle import ENDED, LARGER, MAX_BARREN, Life, Token, World

RUNS = int(os.environ.get("SECATEUR_STATE_MACHINE_RUNS", "20"))
T0 = datetime(2026, 1, 1, tzinfo=UTC)
LEASE = timedelta(seconds=30)
ALL = ("cpu", "gpu.24g", "gpu.80g", "gpu.192g")
CODES = ["nonfinite_activation", "out_of_memory", "disk_full", "hub_unavailable"]

T = TypeVar("T")
Write = Callable[..., Awaitable[Status | None]]


class Lives(RuleBasedStateMachine):
    """Each rule does the same to the database and to the model, and compares what either answers."""

    database: Database
    tenant: Tenant
    runner: asyncio.Runner
    runs = 0

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.tokens: list[Token] = []
        self.answers: dict[str, tuple[str, str]] = {}
        self.now = T0

    def do(self, work: Callable[[AsyncSession], Awaitable[T]]) -> T:
        async def transaction() -> T:
            async with self.database.write() as session:
                return await work(session)

        return self.runner.run(transaction())

    @initialize()
    def empty_the_tables(self) -> None:
        self.runner.run(forget_jobs(self.database))
        type(self).runs += 1

    @rule(seconds=st.sampled_from([1, 10, 25, 31]))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @rule(
        queue=st.sampled_from(["cpu", "gpu.24g"]),
        priority=st.integers(-1, 1),
        start_deadline=st.sampled_from([None, 20]),
        max_runtime=st.sampled_from([None, 45]),
    )
    def submit(self, queue: str, priority: int, start_deadline: int | None, max_runtime: int | None) -> None:
        schedule = {"priority": priority, "start_deadline": start_deadline, "max_runtime": max_runtime}

        async def create(session: AsyncSession) -> Job:
            return await self._create(session, queue, schedule)

        job = self.do(create)
        runtime = timedelta(seconds=max_runtime) if max_runtime else None
        start_by = self.now + timedelta(seconds=start_deadline) if start_deadline else None
        self.world.jobs[job.id] = Life(job.id, self.now, queue, priority, runtime, start_by)

    async def _create(
        self, session: AsyncSession, queue: str, schedule: Mapping[str, Any], retry_of: str | None = None
    ) -> Job:
        recipe = PruneRecipe.model_validate(body(schedule=schedule))
        return (await service.create(session, self.tenant, recipe, queue=queue, at=self.now, retry_of=retry_of))[0]

    @rule(key=st.sampled_from("ab"), asked=st.sampled_from("xy"))
    def submit_with_a_key(self, key: str, asked: str) -> None:
        """The first request with a key makes a job; the same again is answered the same, another one is refused."""
        intent = idempotency.intent_of(self.tenant.id, key, asked)

        async def create(session: AsyncSession) -> idempotency.Answer:
            job = await self._create(session, "cpu", {})
            return idempotency.Answer(202, {}, {"id": job.id})

        async def request() -> str:
            async with idempotency.reserved(self.database, intent, at=self.now) as earlier:
                answer = earlier or await idempotency.once(self.database, intent, create, at=self.now)
            return str(answer.body["id"])

        first = self.answers.get(key)
        if first is not None and first[0] != asked:
            with pytest.raises(ProblemError, match="used for another request"):
                self.runner.run(request())
            return
        job_id = self.runner.run(request())
        if first is None:
            self.answers[key] = asked, job_id
            self.world.jobs[job_id] = Life(job_id, self.now, "cpu")
        assert self.answers[key] == (asked, job_id)

    @rule(queues=st.sampled_from([ALL, ALL, ("cpu",), ("gpu.24g", "gpu.80g")]))
    def hear_the_doorbell(self, queues: tuple[str, ...]) -> None:
        """Rung for a job or for none, once or twice: a worker claims."""
        expected = self.world.claim(queues, LEASE, self.now)

        async def claim(session: AsyncSession) -> Job | None:
            return await claims.claim(session, queues=queues, worker="w", lease=LEASE, at=self.now)

        job = self.do(claim)
        assert (job and (job.id, job.attempt)) == expected
        if expected:
            self.tokens.append(expected)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def heartbeat(self, data: st.DataObject) -> None:
        token = self._some_attempt(data)

        async def renew(session: AsyncSession) -> Status | None:
            return await claims.renew(session, *token, lease=LEASE, at=self.now)

        assert self.do(renew) == self.world.renew(token, LEASE, self.now)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), done=st.integers(1, 4))
    def finish_a_block(self, data: st.DataObject, done: int) -> None:
        token = self._some_attempt(data)
        progress = {"done": done, "total": 4, "unit": "blocks", "eta_seconds": None}

        async def record(session: AsyncSession) -> bool:
            return await claims.record(session, *token, stage="pruning", progress=progress, logs=[], at=self.now)

        assert self.do(record) == self.world.finish_block(token, done)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def succeed(self, data: st.DataObject) -> None:
        token = self._some_attempt(data)
        results: dict[str, Any] = {"metrics": {}, "report": {}, "artifacts": [NewArtifact("m", 1, "a" * 64)]}
        self._end(token, claims.succeed, self.world.succeed(token, self.now), **results)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), code=st.sampled_from(CODES))
    def fail(self, data: st.DataObject, code: str) -> None:
        token = self._some_attempt(data)
        larger = LARGER.get(self.world.jobs[token[0]].queue)
        error = {"code": code, "detail": "it went wrong"}
        expected = self.world.fail(token, code, self.now)
        self._end(token, claims.fail, expected, error=error, max_barren_attempts=MAX_BARREN, larger_queue=larger)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def drain(self, data: st.DataObject) -> None:
        token = self._some_attempt(data)
        self._end(token, claims.release, self.world.release(token, self.now))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def confirm_the_cancel(self, data: st.DataObject) -> None:
        token = self._some_attempt(data)
        self._end(token, claims.confirm_cancelled, self.world.confirm(token, self.now))

    def _end(self, token: Token, write: Write, expected: str | None, **arguments: Any) -> None:
        async def end(session: AsyncSession) -> Status | None:
            return await write(session, *token, **arguments, at=self.now)

        assert self.do(end) == expected

    def _some_attempt(self, data: st.DataObject) -> Token:
        """One that still has its job, as often as any: or else nearly all would be zombies."""
        held = [token for token in self.tokens if self.world.held(token, "running", "cancelling")]
        return data.draw(st.sampled_from(held or self.tokens) | st.sampled_from(self.tokens))

    @precondition(lambda self: self.world.jobs)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.world.jobs)))

        async def cancel(session: AsyncSession) -> bool:
            try:
                await service.cancel(session, self.tenant.id, job_id, at=self.now)
            except ProblemError:
                return False
            return True

        assert self.do(cancel) == self.world.cancel(job_id)

    @precondition(lambda self: self.world.jobs)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.world.jobs)))
        before = self.world.jobs[job_id]

        async def retry(session: AsyncSession) -> Job | None:
            try:
                await service.recipe_to_retry(session, self.tenant.id, job_id)
            except ProblemError:
                return None
            return await self._create(session, before.queue, {}, retry_of=job_id)

        job = self.do(retry)
        assert (job is not None) == (before.status in ENDED - {"succeeded"} and not before.deleted)
        if job is not None:
            self.world.jobs[job.id] = Life(job.id, self.now, before.queue)

    @precondition(lambda self: self.world.jobs)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(sorted(self.world.jobs)))

        async def delete(session: AsyncSession) -> bool:
            try:
                await retention.delete_job(session, self.tenant.id, job_id, at=self.now)
            except ProblemError:
                return False
            return True

        assert self.do(delete) == self.world.delete(job_id)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def begin_an_upload(self, data: st.DataObject) -> None:
        token = self._some_attempt(data)
        held = self.world.held(token, "running", "cancelling")
        self._end(token, claims.begin_upload, held.status if held else None, digests=["a" * 64])

    @rule()
    def reap(self) -> None:
        async def reap_all(session: AsyncSession) -> None:
            await reap(session, at=self.now, max_barren_attempts=MAX_BARREN)

        self.do(reap_all)
        self.world.reap(self.now)

    @invariant()
    def the_database_agrees(self) -> None:
        found = self.runner.run(_snapshot(self.database))
        assert found.jobs.keys() == self.world.jobs.keys()
        assert found.bells == sum(life.bells for life in self.world.jobs.values())
        for job_id, life in self.world.jobs.items():
            _compare(found, found.jobs[job_id], life)


@dataclass(frozen=True)
class Snapshot:
    """What one transaction sees."""

    jobs: dict[str, Job]
    attempts: dict[str, list[Attempt]]
    events: dict[str, list[Event]]
    files: Counter[str]
    bells: int


async def _snapshot(database: Database) -> Snapshot:
    async with database.read() as session:
        attempts, events = defaultdict(list), defaultdict(list)
        for attempt in await session.scalars(select(Attempt).order_by(Attempt.number)):
            attempts[attempt.job_id].append(attempt)
        for event in await session.scalars(select(Event).order_by(Event.seq)):
            events[event.job_id].append(event)
        jobs = {job.id: job for job in await session.scalars(select(Job))}
        files = Counter(await session.scalars(select(Artifact.job_id)))
        bells = await session.scalar(select(func.count()).select_from(OutboxMessage))
        return Snapshot(jobs, attempts, events, files, bells or 0)


def _compare(found: Snapshot, job: Job, life: Life) -> None:
    assert (job.status, job.attempt, job.queue) == (life.status, len(life.tries), life.queue)
    assert (job.barren_attempts, job.blocks_done) == (life.barren, life.blocks)
    assert (job.lease_expires_at, job.stop_by, job.start_by) == (life.lease, life.stop_by, life.start_by)
    assert (job.error and job.error["code"]) == life.error
    tries = [(one.number, one.started_at, one.ended_at, one.outcome) for one in found.attempts[job.id]]
    assert tries == [(number, one.begun, one.over, one.outcome) for number, one in enumerate(life.tries, 1)]
    log = found.events[job.id]
    assert [event.seq for event in log] == list(range(1, job.event_seq + 1))
    assert [event.data["status"] for event in log if event.type == "status"] == life.story
    assert (found.files[job.id], job.deleted_at is not None) == (life.files, life.deleted)


@pytest.fixture
def machine(database_url: str) -> Iterator[type[Lives]]:
    """The machine on one of the databases; it runs an event loop of its own."""
    with asyncio.Runner() as runner:
        database = Database(database_url)
        tenant = runner.run(make_tenant(database))
        yield type("Lives", (Lives,), {"database": database, "tenant": tenant, "runner": runner})
        runner.run(database.close())


@pytest.mark.timeout(3_600)
def test_whatever_happens_the_database_agrees_with_the_model(machine: type[Lives]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=RUNS,
            stateful_step_count=30,
            deadline=None,
            derandomize="SECATEUR_STATE_MACHINE_RUNS" not in os.environ,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            print_blob=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert machine.runs >= RUNS
