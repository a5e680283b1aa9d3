"""The scheduler's round that takes finished models where their jobs want them: one at a time, each by a child process.

Whatever goes wrong is written on the job's integration and never changes the job.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any

import structlog
from sqlalchemy.exc import DBAPIError

from app.accounts.secrets import secret_of
from app.artifacts.models import Artifact
from app.artifacts.store import Store, open_store
from app.integrations import repository
from app.integrations.models import JobIntegration
from app.integrations.registry import INTEGRATIONS
from app.jobs.models import Job
from app.jobs.repository import artifacts_of, report_of
from app.kit import clock
from app.kit.db import Database
from app.kit.keyring import load_keyring
from app.kit.retries import next_try
from app.settings import Settings
from secateur.problems import ProblemError
from workers.child import ChildLostError, ChildProblemError, environment, run_child

# What the child may know of ours beside its order.
_REACHED = ("SECATEUR_MLFLOW_", "SECATEUR_HUB_", "MLFLOW_", "HF_HUB_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_")

log = structlog.get_logger()


async def deliver_due(database: Database, settings: Settings) -> int:
    """Take what is due where it is wanted, one after the other; how many there were."""
    lease, done = timedelta(seconds=settings.integrations.lease_seconds), 0
    while True:
        async with database.write() as session:
            row = await repository.claim(session, lease=lease, at=clock.now())
        if row is None:
            return done
        with structlog.contextvars.bound_contextvars(job_id=row.job_id, integration=row.name, attempt=row.attempts):
            await _Delivery(row, database, settings).run()
        done += 1


class _Delivery:
    """One try at one integration of one job."""

    def __init__(self, row: JobIntegration, database: Database, settings: Settings) -> None:
        self._row = row
        self._database = database
        self._settings = settings
        name = f"{row.job_id}-{row.position}-{row.attempts}"
        self._folder = settings.state_folder / "integrations" / name
        self._log_file = settings.state_folder / "logs" / "integrations" / f"{name}.log"

    async def run(self) -> None:
        """See the try through and write down how it went."""
        work = asyncio.create_task(self._work())
        try:
            values = await self._outcome(work)
        finally:
            work.cancel()
            await asyncio.wait({work})
            await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)
        async with self._database.write() as session:
            if not await repository.write(session, self._row, **values):
                log.warning("integration_fenced")
        log.info("integration_tried", status=values["status"], error=(values["error"] or {}).get("detail"))

    async def _outcome(self, work: asyncio.Task[str]) -> dict[str, Any]:
        """What is to be written when `work` has ended."""
        limit = self._settings.integrations
        try:
            async with asyncio.timeout(limit.timeout_seconds):
                url = await self._while_leased(work)
        except TimeoutError:
            late = ProblemError("integration_failed", f"It was not done within {limit.timeout_seconds:g} seconds.")
            return self._failed(late.as_document())
        except (ProblemError, ChildProblemError) as problem:
            return self._failed(problem.as_document())
        except ChildLostError as lost:
            return self._failed(ProblemError("integration_failed", str(lost)).as_document())
        except Exception as error:  # it is only this integration that has failed, not the round
            log.exception("integration_broke")
            return self._failed(ProblemError("internal_error", type(error).__name__).as_document())
        return {"status": "succeeded", "url": url, "error": None, "due_at": None, "finished_at": clock.now()}

    async def _while_leased(self, work: asyncio.Task[str]) -> str:
        """The result of `work`, whose lease is renewed meanwhile."""
        lease = timedelta(seconds=self._settings.integrations.lease_seconds)
        while not (await asyncio.wait({work}, timeout=lease.total_seconds() / 3))[0]:
            # A database that is away for a moment costs nothing; one that stays away lets the lease run out.
            with suppress(DBAPIError, OSError):
                async with self._database.write() as session:
                    if not await repository.write(session, self._row, due_at=clock.now() + lease):
                        raise ProblemError("integration_failed", "another scheduler has taken this over")
        return work.result()

    def _failed(self, error: Mapping[str, Any]) -> dict[str, Any]:
        now, pauses = clock.now(), self._settings.integrations.retry_seconds
        due_at = next_try(self._row.round, pauses, at=now) if error["retryable"] else None
        status = "pending" if due_at else "failed"
        return {"status": status, "error": dict(error), "due_at": due_at, "finished_at": None if due_at else now}

    async def _work(self) -> str:
        """Fetch the files and have the child take them there; the address that it found for them."""
        for private in (self._folder / "model", self._log_file.parent):
            private.mkdir(parents=True, exist_ok=True, mode=0o700)
        order, files = await self._order()
        async with open_store(self._settings.store_url, endpoint=self._settings.store.endpoint) as store:
            for file in files:
                await _bring(store, file, self._folder / "model")
        result = await run_child(
            "workers.integrator",
            order,
            env=self._environment(),
            log=self._log_file,
            terminate_seconds=self._settings.worker.terminate_seconds,
            on_message=lambda _: None,
        )
        return str(result["url"])

    async def _order(self) -> tuple[dict[str, Any], Sequence[Artifact]]:
        """What the child is told, and the files that it is to have."""
        integration = INTEGRATIONS.get(self._row.name)
        if integration is None:
            raise ProblemError("integration_unavailable", f"{self._row.name} is not an integration of this version.")
        keyring, name = load_keyring(self._settings.keyring_file), integration.secret
        async with self._database.read() as session:
            job = await session.get_one(Job, self._row.job_id)
            report = await report_of(session, job.id)
            files = (await artifacts_of(session, [job.id]))[job.id]
            secret = await secret_of(session, job.tenant_id, name, keyring=keyring) if name else None
        product = {
            "job_id": job.id,
            "repository": job.repository,
            "recipe": job.recipe,
            "metrics": job.metrics or {},
            "report": report or {},
            "started_at": (job.started_at or job.created_at).isoformat(),
            "finished_at": (job.finished_at or job.created_at).isoformat(),
            "folder": str(self._folder / "model"),
        }
        return {"name": self._row.name, "options": self._row.options, "secret": secret, "product": product}, files

    def _environment(self) -> dict[str, str]:
        network = {name: value for name, value in os.environ.items() if name.upper().startswith(_REACHED)}
        return environment({**network, "HF_HOME": str(self._folder / "huggingface")})


async def _bring(store: Store, file: Artifact, folder: Path) -> None:
    """Copy an artifact into the folder. Raises `verification_failed` if its name leads out of it."""
    name = PurePosixPath(file.name)
    if name.is_absolute() or ".." in name.parts:
        raise ProblemError("verification_failed", f"the artifact {file.name!r} would lie outside its folder")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with await asyncio.to_thread(path.open, "wb") as target:
        async for piece in store.read(file.tenant_id, file.sha256):
            await asyncio.to_thread(target.write, piece)
