"""`/v1/sweeps`: one model, several methods and sparsities; submit, look, list, cancel, delete."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Query, Response
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.auth import AuthenticatedRoute, JobsReader, JobsWriter
from app.artifacts import gc
from app.jobs import admission, dispatch
from app.jobs.idempotency import Answer, IdempotencyKey, intent_of, once, reserved
from app.kit import clock
from app.kit.errors import declare
from app.kit.pagination import cut, read_cursor
from app.parts import PartsDep
from app.sweeps import repository, service
from app.sweeps.models import Sweep as SweepRow
from app.sweeps.views import show
from secateur.schemas.sweeps import Sweep, SweepPage, SweepRecipe

router = APIRouter(prefix="/sweeps", tags=["sweeps"], route_class=AuthenticatedRoute)


@router.post(
    "",
    status_code=202,
    response_model=Sweep,
    responses=declare(*admission.PROBLEMS, "idempotency_key_reused", "idempotency_key_in_flight"),
)
async def create_sweep(
    recipe: SweepRecipe, parts: PartsDep, caller: JobsWriter, tasks: BackgroundTasks, idempotency_key: IdempotencyKey = None
) -> Response:
    """Submit a job for each method and each sparsity or pattern: all of them, or none if one is refused."""
    intent = intent_of(caller.tenant.id, idempotency_key, "create_sweep", recipe.model_dump_json())
    async with reserved(parts.database, intent, at=clock.now()) as earlier:
        if earlier is not None:
            return earlier.response()
        accepted = await service.admit(parts, caller, recipe)
        rung: list[str] = []

        async def work(session: AsyncSession) -> Answer:
            sweep, bells = await service.create(session, caller.tenant, recipe, accepted, at=clock.now())
            rung.extend(bell.id for bell in bells)
            shown = await _shown(session, sweep)
            return Answer(202, {"Location": f"/v1/sweeps/{sweep.id}"}, shown.model_dump(mode="json"))

        answer = await once(parts.database, intent, work, at=clock.now())
    again = timedelta(seconds=parts.settings.scheduler.ring_again_seconds)
    tasks.add_task(dispatch.ring, parts.database, parts.doorbell, rung, at=clock.now(), ring_again_after=again)
    return answer.response()


@router.get("", responses=declare("validation_error"))
async def list_sweeps(
    parts: PartsDep,
    caller: JobsReader,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: str | None = None,
) -> SweepPage:
    """Sweeps, newest first."""
    before = read_cursor(cursor, parts.keyring) if cursor is not None else None
    async with parts.database.read() as session:
        found = await repository.page(session, caller.tenant.id, before=before, limit=limit + 1)
        rows, next_cursor = cut(found, limit, parts.keyring)
        jobs = await repository.jobs_of(session, [row.id for row in rows])
    data = [show(row, jobs[row.id]) for row in rows]
    return SweepPage(data=data, has_more=next_cursor is not None, next_cursor=next_cursor)


@router.get("/{sweep_id}", responses=declare("not_found"))
async def get_sweep(sweep_id: str, parts: PartsDep, caller: JobsReader) -> Sweep:
    """How far the jobs are, and the table of what they have measured."""
    async with parts.database.read() as session:
        return await _shown(session, await service.found(session, caller.tenant.id, sweep_id))


@router.post("/{sweep_id}/cancel", responses=declare("not_found"))
async def cancel_sweep(sweep_id: str, parts: PartsDep, caller: JobsWriter) -> Sweep:
    """Cancel every job that has not ended. Cancelling twice is no error; what has succeeded stays."""
    async with parts.database.write() as session:
        return await _shown(session, await service.cancel(session, caller.tenant.id, sweep_id, at=clock.now()))


@router.delete("/{sweep_id}", status_code=204, responses=declare("not_found", "sweep_not_finished"))
async def delete_sweep(sweep_id: str, parts: PartsDep, caller: JobsWriter, tasks: BackgroundTasks) -> None:
    """Remove the sweep and the files of its jobs, which have ended. The jobs' tombstones stay."""
    async with parts.database.write() as session:
        digests = await service.remove(session, caller.tenant.id, sweep_id, at=clock.now())
    tasks.add_task(gc.remove, parts.database, parts.store, caller.tenant.id, digests)


async def _shown(session: AsyncSession, sweep: SweepRow) -> Sweep:
    return show(sweep, (await repository.jobs_of(session, [sweep.id]))[sweep.id])
