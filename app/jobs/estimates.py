"""`/v1/estimates`: what a job would cost, told before it is submitted."""

from __future__ import annotations

from fastapi import APIRouter
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.auth import AuthenticatedRoute, JobsWriter
from app.jobs import admission, routing
from app.jobs.admission import Accepted
from app.jobs.models import Job
from app.jobs.presence import workers_by_queue
from app.jobs.states import Status
from app.kit import clock
from app.kit.errors import declare
from app.parts import PartsDep
from secateur.pruning.estimate import SPREAD, UNMEASURED_SPREAD, pace_of
from secateur.recipes import Recipe
from secateur.schemas.estimates import Estimate, Pace, Range, Tokens

RECENT = 20

router = APIRouter(prefix="/estimates", tags=["jobs"], route_class=AuthenticatedRoute)


@router.post("", responses=declare(*admission.PROBLEMS))
async def create_estimate(recipe: Recipe, parts: PartsDep, caller: JobsWriter) -> Estimate:
    """What the job would cost. The body is a job's; what would refuse the job is refused here too. Nothing is kept."""
    accepted = await admission.admit(parts, caller, recipe)
    async with parts.database.read() as session:
        pace = await _pace(session, accepted)
        workers = await workers_by_queue(session, at=clock.now())
    unserved = workers is not None and not workers[accepted.queue]
    return _shown(accepted, pace, [f"no worker serves the queue {accepted.queue} at the moment"] if unserved else [])


async def _pace(session: AsyncSession, accepted: Accepted) -> Pace:
    """That of the queue's latest jobs: of the same kind and method if there are any, otherwise of all."""
    wanted = (Job.queue == accepted.queue, Job.status == Status.SUCCEEDED, Job.finished_at.is_not(None))
    query = select(Job.kind, Job.method, Job.metrics).where(*wanted).order_by(Job.finished_at.desc()).limit(RECENT)
    found = [
        (row.kind, row.method, (row.metrics or {}).get("operations_per_second")) for row in await session.execute(query)
    ]
    same = (accepted.recipe.kind, accepted.recipe.method_name)
    alike = [float(pace) for kind, method, pace in found if pace and (kind, method) == same]
    every = [float(pace) for *_, pace in found if pace]
    pace, measured = pace_of(alike or every, "cpu" if accepted.queue == routing.CPU else "gpu")
    return Pace(operations_per_second=pace, measured=measured)


def _shown(accepted: Accepted, pace: Pace, warnings: list[str]) -> Estimate:
    estimate = accepted.estimate
    spread = SPREAD if pace.measured else UNMEASURED_SPREAD
    low, high = estimate.seconds(pace.operations_per_second, spread=spread)
    return Estimate(
        recipe=accepted.recipe,
        parameters=estimate.parameters,
        pruned_parameters=estimate.pruned_parameters,
        tokens=Tokens(calibration=estimate.calibration_tokens, evaluation=estimate.evaluation_tokens),
        operations=estimate.operations,
        peak_memory_bytes=estimate.memory_bytes,
        device_memory_bytes=estimate.device_bytes,
        disk_bytes=estimate.disk_bytes,
        seconds=Range(low=round(low, 1), high=round(high, 1)),
        pace=pace,
        queue=accepted.queue,
        warnings=[*estimate.warnings, *warnings],
    )
