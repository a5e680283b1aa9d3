"""`POST /v1/models/{id}/materialize`: an ordinary model of an elastic one, written once for all who ask for the same."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, BackgroundTasks, Response
from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.auth import AuthenticatedRoute, JobsWriter
from app.artifacts.models import Artifact
from app.jobs import admission, service
from app.jobs.endpoints import Queued, enqueue, shown
from app.jobs.idempotency import IdempotencyKey, intent_of, reserved
from app.jobs.models import Job as JobRow
from app.jobs.states import Status
from app.kit import clock
from app.kit.errors import declare
from app.models import artifact
from app.parts import PartsDep
from secateur.problems import ProblemError
from secateur.recipes import ExportRecipe, Model
from secateur.schemas.jobs import Job
from secateur.schemas.models import Materialization

HEADER = "elastic.json"  # what a job of kind `elastic` leaves beside the weights
_LIVING = (Status.QUEUED, Status.RUNNING, Status.SUCCEEDED)

router = APIRouter(prefix="/models", tags=["models"], route_class=AuthenticatedRoute)


@router.post(
    "/{model_id:path}/materialize",
    status_code=202,
    response_model=Job,
    responses={
        200: {"model": Job, "description": "A job that makes this model, or has made it."},
        **declare(
            "not_found", "model_not_elastic", *admission.PROBLEMS, "idempotency_key_reused", "idempotency_key_in_flight"
        ),
    },
)
async def materialize_model(
    *,
    model_id: str,
    wanted: Materialization,
    parts: PartsDep,
    caller: JobsWriter,
    tasks: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Make an ordinary model of an elastic one, by a job of kind `export`.

    `model_id` is the id of the job that made the elastic model, or its repository. Whoever asks for the same again gets the
    same job. Afterwards `sparsity-0.63` is a revision of the elastic model's repository.
    """
    intent = intent_of(caller.tenant.id, idempotency_key, "materialize", model_id + wanted.model_dump_json())
    async with reserved(parts.database, intent, at=clock.now()) as earlier:
        if earlier is not None:
            return earlier.response()
        async with parts.database.read() as session:
            recipe = await _recipe(session, caller.tenant.id, model_id, wanted)
            there = await _living(session, caller.tenant.id, recipe)
            if there is not None:
                return Response((await shown(session, there)).model_dump_json(), media_type="application/json")
        accepted = await admission.admit(parts, caller, recipe)

        async def create(session: AsyncSession) -> Queued:
            return await service.create(session, caller.tenant, accepted.recipe, queue=accepted.queue, at=clock.now())

        return await enqueue(parts, intent, create, tasks)


async def _recipe(session: AsyncSession, tenant_id: str, model_id: str, wanted: Materialization) -> ExportRecipe:
    """Raises `not_found` for what is no model of the tenant's, and `model_not_elastic`."""
    try:
        snapshot = await artifact.find(session, tenant_id, Model(source="artifact", id=model_id))
    except ValidationError:
        raise ProblemError("not_found", "there is no such model") from None
    if HEADER not in snapshot.files:
        raise ProblemError(
            "model_not_elastic",
            f"'{model_id}' has one sparsity: job {snapshot.commit} made no elastic model.",
            hint="Submit a job of kind 'elastic', and materialise what it makes.",
        )
    model = Model(source="artifact", id=snapshot.repository, revision=snapshot.commit)
    sparsity: Any = {"target": wanted.sparsity, "allocation": wanted.allocation}
    return ExportRecipe(kind="export", model=model, sparsity=sparsity, output=wanted.output)


async def _living(session: AsyncSession, tenant_id: str, recipe: ExportRecipe) -> JobRow | None:
    """The newest job that makes the same model and has not failed; one that has succeeded still has its files."""
    mine = (JobRow.tenant_id == tenant_id, JobRow.kind == recipe.kind, JobRow.model == recipe.model.id)
    target = JobRow.recipe["sparsity"]["target"].as_float() == recipe.sparsity.target
    query = select(JobRow).where(*mine, target, JobRow.status.in_(_LIVING), JobRow.deleted_at.is_(None))
    for job in await session.scalars(query.order_by(JobRow.created_at.desc())):
        asked = ExportRecipe.model_validate(job.recipe)
        same = (asked.model, asked.sparsity, asked.output) == (recipe.model, recipe.sparsity, recipe.output)
        kept = select(Artifact.id).where(Artifact.job_id == job.id).limit(1)
        if same and (job.status != Status.SUCCEEDED or await session.scalar(kept)):
            return job
    return None
