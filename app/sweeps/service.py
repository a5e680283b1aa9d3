"""What a client can do with sweeps. The caller opens the transaction, commits it, and then rings the doorbells."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import delete
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.auth import Caller
from app.accounts.models import Tenant
from app.jobs import admission, retention
from app.jobs import service as jobs
from app.jobs.admission import Accepted
from app.jobs.models import OutboxMessage
from app.jobs.states import TERMINAL
from app.kit.ids import new_id
from app.parts import Parts
from app.sweeps import repository
from app.sweeps.models import Sweep, SweepJob
from secateur.problems import Fault, ProblemError
from secateur.schemas.sweeps import SweepRecipe


async def admit(parts: Parts, caller: Caller, sweep: SweepRecipe) -> list[Accepted]:
    """Accept every job of the sweep, or none. The model is resolved and read once; no session is held meanwhile.

    Raises the problems that `admission.PROBLEMS` names, pointing into the sweep.
    """
    accepted: list[Accepted] = []
    for index, recipe in enumerate(sweep.recipes()):
        try:
            if accepted:
                accepted.append(await admission.admit_also(accepted[0], recipe, parts.settings))
            else:
                accepted.append(await admission.admit(parts, caller, recipe))
        except ProblemError as problem:
            raise _pointed(problem, sweep, index) from problem
    admission.require_room([one.estimate for one in accepted], parts.settings)
    return accepted


def _pointed(problem: ProblemError, sweep: SweepRecipe, index: int) -> ProblemError:
    """The problem of the job at `index`, pointing at what in the sweep's body made it."""
    method, cell = divmod(index, len(sweep.cells))
    unstructured = len(sweep.sparsities)
    amount = f"/sparsities/{cell}" if cell < unstructured else f"/patterns/{cell - unstructured}"
    places = {
        "/sparsity/allocation": "/allocation",
        "/sparsity/target": amount,
        "/sparsity/pattern": amount,
        "/method": f"/methods/{method}",
    }
    faults = [Fault(_moved(fault.pointer, places), fault.detail) for fault in problem.faults]
    return ProblemError(problem.code, problem.detail, hint=problem.hint, faults=faults)


def _moved(pointer: str, places: dict[str, str]) -> str:
    found = next((old for old in places if pointer == old or pointer.startswith(f"{old}/")), None)
    return pointer if found is None else places[found] + pointer.removeprefix(found)


async def create(
    session: AsyncSession, tenant: Tenant, asked: SweepRecipe, accepted: Sequence[Accepted], *, at: datetime
) -> tuple[Sweep, list[OutboxMessage]]:
    """Queue all jobs of a sweep, with a doorbell each."""
    recipe = asked.model_copy(update={"model": accepted[0].recipe.model})
    sweep = Sweep(id=new_id("swp"), tenant_id=tenant.id, recipe=recipe.model_dump(mode="json"), created_at=at)
    session.add(sweep)
    await session.flush()
    bells = []
    for position, one in enumerate(accepted):
        job, bell = await jobs.create(session, tenant, one.recipe, queue=one.queue, at=at)
        session.add(SweepJob(sweep_id=sweep.id, position=position, job_id=job.id))
        bells.append(bell)
    await session.flush()
    return sweep, bells


async def cancel(session: AsyncSession, tenant_id: str, sweep_id: str, *, at: datetime) -> Sweep:
    """Cancel all jobs that have not ended: queued ones at once, running ones by their workers. May be repeated.

    Raises `not_found`.
    """
    sweep = await found(session, tenant_id, sweep_id)
    ids = [job.id for job in (await repository.jobs_of(session, [sweep.id]))[sweep.id] if job.status not in TERMINAL]
    for job_id in sorted(ids):  # always in the same order: two that cancel at once do not wait for each other
        await jobs.cancel_if_active(session, tenant_id, job_id, at=at)
    return sweep


async def remove(session: AsyncSession, tenant_id: str, sweep_id: str, *, at: datetime) -> list[str]:
    """Delete the sweep and, as `retention.delete_job` does, its jobs. The digests of their files.

    Raises `not_found`, and `sweep_not_finished` while one of its jobs has not ended.
    """
    sweep = await found(session, tenant_id, sweep_id)
    rows = (await repository.jobs_of(session, [sweep.id]))[sweep.id]
    if left := sum(job.status not in TERMINAL for job in rows):
        told = f"{left} of the {len(rows)} jobs of sweep {sweep_id} have not ended"
        raise ProblemError("sweep_not_finished", told, hint="Cancel the sweep, then delete it.")
    digests = [digest for job in rows for digest in await retention.delete_job(session, tenant_id, job.id, at=at)]
    await session.execute(delete(SweepJob).where(SweepJob.sweep_id == sweep.id))
    await session.delete(sweep)
    return digests


async def found(session: AsyncSession, tenant_id: str, sweep_id: str) -> Sweep:
    """The tenant's sweep. Raises `not_found`."""
    sweep = await repository.find(session, tenant_id, sweep_id)
    if sweep is None:
        raise ProblemError("not_found", f"there is no sweep {sweep_id}")
    return sweep
