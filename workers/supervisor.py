"""One attempt at one job: claim it, keep its lease, run its children, and write down how it ended.

Every write names the attempt, so whatever a supervisor that lost its job still does, it changes nothing.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from datetime import timedelta
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import structlog
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.secrets import SecretName, secret_of
from app.artifacts.store import Store, open_store
from app.jobs import claims, routing
from app.jobs.models import Job
from app.jobs.states import TERMINAL, Status
from app.kit import clock
from app.kit.db import Database, moment
from app.kit.disk import require_reserve
from app.kit.keyring import load_keyring
from app.models import artifact
from app.settings import Settings
from secateur.problems import ProblemError
from secateur.recipes import read_recipe
from workers import drain, environments, handover, tidying
from workers.child import ChildDrainedError, ChildLostError, ChildProblemError, run_child
from workers.messages import Message
from workers.updates import fold

TICK_SECONDS = 0.5
_AWAY = frozenset({"hub_unavailable", "service_unavailable"})
_WORTH_FINISHING = frozenset({"pruning", "evaluating", "packaging", "uploading"})

log = structlog.get_logger()
T = TypeVar("T")


class Reason(Enum):
    """Why a supervisor lets go of a job that is not finished."""

    CANCELLED = auto()
    FENCED = auto()
    DRAINED = auto()


class LetGoError(Exception):
    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.name)
        self.reason = reason


async def work_once(settings: Settings) -> bool:
    """Claim the best queued job of this worker's queues and see it through; False if there was none."""
    database = Database(settings.database_url, pooled=False)
    try:
        await tidying.sweep(settings, database)
        await asyncio.to_thread(tidying.tidy, settings, at=clock.now())
        async with open_store(settings.store_url, endpoint=settings.store.endpoint) as store:
            async with database.write() as session:
                job = await _claim(session, settings)
            if job is None:
                return False
            with structlog.contextvars.bound_contextvars(job_id=job.id, attempt=job.attempt):
                await Attempt(job, settings, database, store).run()
            return True
    finally:
        await database.close()


async def _claim(session: AsyncSession, settings: Settings) -> Job | None:
    """The job to work on. None if there is none, or no room for it: that is told in the log of the one that waits."""
    at = await moment(session)
    try:
        require_reserve(settings.state_folder, settings.disk.reserve_bytes)
    except ProblemError as problem:
        log.warning("no_claim", detail=problem.detail)
        why = f"the worker on {socket.gethostname()} begins no job: its disk is almost full"
        await claims.decline(session, queues=settings.worker.queues, why=why, at=at)
        return None
    worker, lease = f"{socket.gethostname()}:{os.getpid()}", timedelta(seconds=settings.worker.lease_seconds)
    return await claims.claim(session, queues=settings.worker.queues, worker=worker, lease=lease, at=at)


class Attempt:
    """The supervisor's side of one attempt, from the claim to the end."""

    def __init__(self, job: Job, settings: Settings, database: Database, store: Store) -> None:
        self._job = job
        self._settings = settings
        self._database = database
        self._store = store
        self._unwritten: list[Message] = []
        self._renewed_at = time.monotonic()
        self._stage = ""
        self._drained = asyncio.Event()
        self._drained_at = 0.0
        self._job_folder = settings.work_folder / job.id
        self._folder = self._job_folder / str(job.attempt)
        self._log_file = settings.state_folder / "logs" / "jobs" / f"{job.id}-{job.attempt}.log"

    async def run(self) -> None:
        """See the attempt through and write its end, whatever it is."""
        log.info("attempt_started")
        try:
            product = await self._guarded(self._produce())
        except (ProblemError, ChildProblemError) as problem:
            await self._fail(problem.as_document())
        except LetGoError as let_go:
            await self._let_go(let_go.reason)
        except ChildDrainedError:
            await self._let_go(Reason.DRAINED)
        except ChildLostError as lost:
            # Whoever stops a worker may have signalled all of its processes.
            await (self._let_go(Reason.DRAINED) if drain.under_way() else self._lose(lost))
        except Exception as unforeseen:
            log.exception("attempt_broke")
            await self._fail(_told(unforeseen).as_document())
        else:
            await self._settle(partial(claims.succeed, **product))
        log.info("attempt_ended")

    async def _produce(self) -> dict[str, Any]:
        """Fetch, prune, upload; what `claims.succeed` is to be told."""
        earlier = self._earlier_attempts()
        if found := await asyncio.to_thread(handover.find, earlier):
            folder, result = found
            self._hear({"type": "log", "level": "info", "message": f"The result of attempt {folder.name} is taken over."})
        else:
            folder, result = self._folder, await self._prune(earlier)
            await asyncio.to_thread(handover.leave, folder, result)
        self._hear({"type": "stage", "stage": "uploading"})
        files = [_named_plainly(claims.NewArtifact(**file)) for file in result["files"]]
        await self._upload(files, folder / handover.OUTPUT)
        days = self._settings.retention.artifact_days
        keep_for = timedelta(days=days) if days else None
        return {"metrics": result["metrics"], "report": result["report"], "artifacts": files, "keep_for": keep_for}

    async def _upload(self, files: Sequence[claims.NewArtifact], output: Path) -> None:
        if await self._persist(partial(claims.begin_upload, digests=[file.sha256 for file in files])) is None:
            raise LetGoError(Reason.FENCED)
        for file in files:
            await self._patiently(partial(self._store.put_file, self._job.tenant_id, file.sha256, output / file.name))

    async def _prune(self, earlier: Sequence[Path]) -> dict[str, Any]:
        """Fetch and prune; the runner's result."""
        output, cache = self._folder / handover.OUTPUT, self._cache / "perplexity"
        for folder in (self._folder / "texts", self._folder / "tmp", output, cache, self._log_file.parent):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        order: dict[str, Any] = {"recipe": self._job.recipe, "texts": str(self._folder / "texts")}
        self._hear({"type": "stage", "stage": "downloading"})
        credentials = await self._patiently(self._credentials) | {"source": await self._patiently(self._made_model)}
        fetched = await self._patiently(
            lambda: self._child("workers.fetcher", {**order, **credentials}, environments.of_fetcher(self._cache))
        )
        folders = {"source": fetched["source"], "output": str(output), "cache": str(cache), "work": str(self._job_folder)}
        outputs = [str(attempt / handover.OUTPUT) for attempt in earlier]
        order |= {**folders, "earlier": outputs}
        return dict(await self._child("workers.runner", order, environments.of_runner(self._folder)))

    async def _made_model(self) -> str | None:
        """The folder of a model that an earlier job made, brought from the store; None for one that the fetcher brings."""
        model, tenant_id = read_recipe(self._job.recipe).model, self._job.tenant_id
        if model.source != "artifact":
            return None
        async with self._database.read() as session:
            snapshot = await artifact.find(session, tenant_id, model)
        bring = partial(
            artifact.fetch,
            snapshot,
            self._store,
            tenant_id=tenant_id,
            scratch=self._folder / "source",
            settings=self._settings,
        )
        return str(await self._patiently(bring))

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """What `work` gives, tried again with growing pauses while what it needs is away; the lease is kept meanwhile."""
        pause, deadline = TICK_SECONDS, time.monotonic() + self._settings.worker.patience_seconds
        while True:
            try:
                return await work()
            except (ProblemError, ChildProblemError, DBAPIError) as error:
                document = (_told(error) if isinstance(error, DBAPIError) else error).as_document()
                if document["code"] not in _AWAY or time.monotonic() + pause > deadline:
                    raise
            self._hear({"type": "log", "level": "warning", "message": f"{document['detail']}; trying again"})
            await asyncio.sleep(pause)
            pause = min(2 * pause, 60.0)

    async def _child(self, module: str, order: Mapping[str, Any], env: Mapping[str, str]) -> Mapping[str, Any]:
        return await run_child(
            module,
            order,
            env=env,
            log=self._log_file,
            terminate_seconds=self._settings.worker.terminate_seconds,
            on_message=self._hear,
            drained=self._drained,
        )

    def _hear(self, message: Message) -> None:
        if message["type"] == "stage":
            self._stage = message["stage"]
        self._unwritten.append(message)

    def _earlier_attempts(self) -> list[Path]:
        """What earlier attempts left on this file system, newest first: their finished blocks need no second pruning."""
        candidates = (self._job_folder / str(attempt) for attempt in range(self._job.attempt - 1, 0, -1))
        return [folder for folder in candidates if folder.is_dir()]

    @property
    def _cache(self) -> Path:
        return self._settings.cache_folder / self._job.tenant_id

    async def _credentials(self) -> dict[str, Any]:
        keyring = load_keyring(self._settings.keyring_file)
        async with self._database.read() as session:
            tokens = {name: await secret_of(session, self._job.tenant_id, name, keyring=keyring) for name in SecretName}
        return {"tenant_id": self._job.tenant_id, "tokens": tokens}

    async def _guarded(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work`, while the lease is kept and nobody wants the job back; raises LetGoError otherwise."""
        task = asyncio.create_task(work)
        try:
            while True:
                await asyncio.wait({task}, timeout=min(TICK_SECONDS, self._settings.worker.heartbeat_seconds))
                is_done = task.done()  # before the beat, so that all it has said is written down by then
                reason = await self._beat()
                if reason is None and not is_done and drain.under_way() and self._may_leave():
                    reason = Reason.DRAINED
                if reason is not None:
                    raise LetGoError(reason)
                if is_done and not self._unwritten:
                    return task.result()
                if is_done:  # the beat could not write it down: once more, as long as the lease lasts
                    await asyncio.sleep(TICK_SECONDS)
        finally:
            task.cancel()
            await asyncio.wait({task})

    def _may_leave(self) -> bool:
        """Whether a worker that is told to stop may let go of the attempt now.

        That is before any block was begun, or when the time for a drain is over. Until then the runner is asked to leave at
        the end of its block; behind the last block the attempt goes on to its end.
        """
        if self._stage not in _WORTH_FINISHING:
            return True
        if not self._drained.is_set():
            self._drained_at = time.monotonic()
            self._drained.set()
        return time.monotonic() - self._drained_at > self._settings.worker.drain_seconds

    async def _beat(self) -> Reason | None:
        """Write down what is new and renew the lease when it is time; why to let go, if there is a reason."""
        since = time.monotonic() - self._renewed_at
        due = since >= self._settings.worker.heartbeat_seconds
        if not (due or self._unwritten):
            return None
        try:
            async with asyncio.timeout(self._settings.worker.lease_seconds):
                await self._record()
                return await self._renew() if due else None
        except (DBAPIError, OSError):
            # A database that is away for less than a lease costs nothing; after that another worker may have the job.
            log.warning("heartbeat_failed", exc_info=True)
            return Reason.FENCED if since > self._settings.worker.lease_seconds else None

    async def _renew(self) -> Reason | None:
        asked_at = time.monotonic()
        status = await self._extend(timedelta(seconds=self._settings.worker.lease_seconds))
        if status is None:
            return Reason.FENCED
        self._renewed_at = asked_at
        return Reason.CANCELLED if status is Status.CANCELLING else None

    async def _extend(self, lease: timedelta) -> Status | None:
        async with self._database.write() as session:
            return await claims.renew(session, self._job.id, self._job.attempt, lease=lease, at=await moment(session))

    async def _record(self) -> None:
        messages = list(self._unwritten)
        async with self._database.write() as session:
            for record in fold(messages):
                await claims.record(session, self._job.id, self._job.attempt, **record, at=await moment(session))
        del self._unwritten[: len(messages)]

    async def _lose(self, lost: ChildLostError) -> None:
        """Give the lease up: the reaper decides, as for every lost attempt, whether there is another one."""
        log.warning("child_lost", detail=str(lost))
        self._unwritten.append({"type": "log", "level": "error", "message": str(lost)})
        await self._record()
        await self._extend(timedelta(0))

    async def _let_go(self, reason: Reason) -> None:
        log.info("attempt_let_go", reason=reason.name)
        if reason is Reason.DRAINED:
            await self._settle(claims.release)
        elif reason is Reason.CANCELLED:
            await self._settle(claims.confirm_cancelled)

    async def _fail(self, error: Mapping[str, Any]) -> None:
        write = partial(
            claims.fail,
            error=error,
            max_barren_attempts=self._settings.worker.max_barren_attempts,
            larger_queue=routing.larger(self._job.queue, self._settings.jobs.queues),
        )
        await self._settle(write)

    async def _settle(self, write: Callable[..., Awaitable[Status | None]]) -> None:
        """Write how the attempt ended. If that comes too late, the job was cancelled in the last moment, or is not ours.

        Files are removed only when the job has ended: the next attempt begins with the blocks that this one finished.
        """
        status = await self._persist(write) or await self._persist(claims.confirm_cancelled)
        if status in TERMINAL:
            await asyncio.to_thread(shutil.rmtree, self._job_folder, ignore_errors=True)

    async def _persist(self, write: Callable[..., Awaitable[Status | None]]) -> Status | None:
        """One fenced write, tried again for as long as the lease lasts."""
        while True:
            try:
                async with self._database.write() as session:
                    return await write(session, self._job.id, self._job.attempt, at=await moment(session))
            except (DBAPIError, OSError):
                if time.monotonic() - self._renewed_at > self._settings.worker.lease_seconds:
                    raise
                await asyncio.sleep(TICK_SECONDS)


def _told(unforeseen: Exception) -> ProblemError:
    """What the user is told of an exception that nobody foresaw."""
    if isinstance(unforeseen, DBAPIError):
        return ProblemError("service_unavailable", "The database does not answer.")
    if isinstance(unforeseen, OSError) and unforeseen.errno == errno.ENOSPC:
        return ProblemError("disk_full", "The worker's disk is full.", hint="Make room, then retry the job.")
    return ProblemError("internal_error", f"The worker failed with {type(unforeseen).__name__}; its log says more.")


def _named_plainly(file: claims.NewArtifact) -> claims.NewArtifact:
    """`file`, if its name is that of a file directly in the output folder. Raises `verification_failed`."""
    if Path(file.name).name != file.name or file.name in {".", ".."}:
        raise ProblemError("verification_failed", f"{file.name!r} is no file of the output folder.")
    return file
