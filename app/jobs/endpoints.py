"""`/v1/jobs`: submit, look, wait, list, cancel, retry, and what a job has left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Depends, Header, Query, Request, Response
from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.auth import ArtifactsReader, AuthenticatedRoute, Caller, JobsReader, JobsWriter
from app.artifacts import gc
from app.integrations import repository as integrations
from app.jobs import admission, dispatch, repository, retention, service
from app.jobs.idempotency import Answer, IdempotencyKey, Intent, intent_of, once, reserved
from app.jobs.models import Job as JobRow
from app.jobs.models import OutboxMessage
from app.jobs.repository import JobFilter, Look
from app.jobs.states import TERMINAL, Status
from app.jobs.views import show
from app.jobs.waiting import waiting_of
from app.kit import clock, sse
from app.kit.errors import declare
from app.kit.pagination import cut, read_cursor
from app.kit.queries import METADATA_KEY, METADATA_PARAMETER, Moment
from app.parts import Parts, PartsDep
from secateur.problems import ProblemError
from secateur.recipes import Recipe
from secateur.schemas.artifacts import Artifact, ArtifactList
from secateur.schemas.events import Event, EventList
from secateur.schemas.jobs import Attempt, AttemptList, Job, JobPage

LOOK_SECONDS = 0.25
_MAX_SEQ = 2**31 - 1

Queued = tuple[JobRow, OutboxMessage]

router = APIRouter(prefix="/jobs", tags=["jobs"], route_class=AuthenticatedRoute)

_ADMISSION = (*admission.PROBLEMS, "idempotency_key_reused", "idempotency_key_in_flight")


def _filter(
    request: Request,
    status: Annotated[list[Status], Query(description="Repeat it for several.")] = [],  # noqa: B006 (FastAPI copies it)
    method: str | None = None,
    model: str | None = None,
    created_after: Moment | None = None,
) -> JobFilter:
    pairs = ((METADATA_KEY.fullmatch(name), value) for name, value in request.query_params.items())
    labels = {match[1]: value for match, value in pairs if match}
    return JobFilter(statuses=status, method=method, model=model, created_after=created_after, labels=labels)


@router.post("", status_code=202, response_model=Job, responses=declare(*_ADMISSION))
async def create_job(
    recipe: Recipe, parts: PartsDep, caller: JobsWriter, tasks: BackgroundTasks, idempotency_key: IdempotencyKey = None
) -> Response:
    """Submit a job. It is accepted when the model is found and fits the recipe, and then waits for a worker."""
    intent = intent_of(caller.tenant.id, idempotency_key, "create_job", recipe.model_dump_json())
    async with reserved(parts.database, intent, at=clock.now()) as earlier:
        if earlier is not None:
            return earlier.response()
        accepted = await admission.admit(parts, caller, recipe)

        async def create(session: AsyncSession) -> Queued:
            return await service.create(session, caller.tenant, accepted.recipe, queue=accepted.queue, at=clock.now())

        return await enqueue(parts, intent, create, tasks)


@router.post(
    "/{job_id}/retry",
    status_code=202,
    response_model=Job,
    responses=declare("not_found", "job_not_retryable", *_ADMISSION),
)
async def retry_job(
    job_id: str, parts: PartsDep, caller: JobsWriter, tasks: BackgroundTasks, idempotency_key: IdempotencyKey = None
) -> Response:
    """Submit the recipe of a failed, cancelled or expired job again, as a new job with `retry_of`.

    It is admitted as if it were new: the caller may still read the model, and the model is still what the recipe fits.
    """
    intent = intent_of(caller.tenant.id, idempotency_key, "retry_job", job_id)
    async with reserved(parts.database, intent, at=clock.now()) as earlier:
        if earlier is not None:
            return earlier.response()
        async with parts.database.read() as session:
            recipe = await service.recipe_to_retry(session, caller.tenant.id, job_id)
        accepted = await admission.admit(parts, caller, recipe)

        async def retry(session: AsyncSession) -> Queued:
            return await service.create(
                session, caller.tenant, accepted.recipe, queue=accepted.queue, at=clock.now(), retry_of=job_id
            )

        return await enqueue(parts, intent, retry, tasks)


async def enqueue(
    parts: Parts, intent: Intent | None, create: Callable[[AsyncSession], Awaitable[Queued]], tasks: BackgroundTasks
) -> Response:
    """Commit what `create` makes, answer with the job, and ring the doorbell after that."""
    bells: list[str] = []

    async def work(session: AsyncSession) -> Answer:
        job, bell = await create(session)
        bells.append(bell.id)
        # A new job has no files; where it stands in line is asked when somebody looks, for many submit and few wait here.
        made = show(job, integrations=(await integrations.of_jobs(session, [job.id]))[job.id])
        return Answer(202, {"Location": f"/v1/jobs/{job.id}"}, made.model_dump(mode="json"))

    answer = await once(parts.database, intent, work, at=clock.now())
    again = timedelta(seconds=parts.settings.scheduler.ring_again_seconds)
    tasks.add_task(dispatch.ring, parts.database, parts.doorbell, bells, at=clock.now(), ring_again_after=again)
    return answer.response()


@router.post("/{job_id}/cancel", responses=declare("not_found", "job_not_cancellable"))
async def cancel_job(job_id: str, parts: PartsDep, caller: JobsWriter) -> Job:
    """Cancel a job: a queued one at once, a running one within seconds. Cancelling twice is no error."""
    async with parts.database.write() as session:
        job = await service.cancel(session, caller.tenant.id, job_id, at=clock.now())
        return await shown(session, job)


@router.delete("/{job_id}", status_code=204, responses=declare("not_found", "job_not_finished"))
async def delete_job(job_id: str, parts: PartsDep, caller: JobsWriter, tasks: BackgroundTasks) -> None:
    """Remove the files and the report of a job that has ended. A tombstone stays, which `GET` shows and no list does."""
    async with parts.database.write() as session:
        digests = await retention.delete_job(session, caller.tenant.id, job_id, at=clock.now())
    tasks.add_task(gc.remove, parts.database, parts.store, caller.tenant.id, digests)


@router.post("/{job_id}/integrations/retry", responses=declare("not_found"))
async def retry_integrations(job_id: str, parts: PartsDep, caller: JobsWriter) -> Job:
    """Try the integrations that have failed, or wait for their next try, again now."""
    async with parts.database.write() as session:
        job = await _found(session, caller.tenant.id, job_id)
        await integrations.retry(session, job_id, at=clock.now())
        return await shown(session, job)


@router.get("", responses=declare("validation_error"), openapi_extra={"parameters": [METADATA_PARAMETER]})
async def list_jobs(
    parts: PartsDep,
    caller: JobsReader,
    wanted: Annotated[JobFilter, Depends(_filter)],
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: str | None = None,
) -> JobPage:
    """Jobs, newest first."""
    before = read_cursor(cursor, parts.keyring) if cursor is not None else None
    async with parts.database.read() as session:
        found = await repository.page(session, caller.tenant.id, wanted, before=before, limit=limit + 1)
        rows, next_cursor = cut(found, limit, parts.keyring)
        ids = [row.id for row in rows]
        files, taken = await repository.artifacts_of(session, ids), await integrations.of_jobs(session, ids)
        waiting = await waiting_of(session, rows, at=clock.now())
    data = [show(row, files[row.id], taken[row.id], waiting.get(row.id)) for row in rows]
    return JobPage(data=data, has_more=next_cursor is not None, next_cursor=next_cursor)


@router.get("/{job_id}", responses=declare("not_found"))
async def get_job(
    job_id: str,
    request: Request,
    parts: PartsDep,
    caller: JobsReader,
    wait: Annotated[float, Query(ge=0, description="Wait so many seconds for a change, or as long as is allowed.")] = 0,
) -> Job:
    """One job; with `wait`, as soon as it has changed, has ended, or the time is over."""
    async with parts.database.read() as session:
        job = await _found(session, caller.tenant.id, job_id)
        if wait == 0 or job.status in TERMINAL:
            return await shown(session, job)
        first = await repository.look(session, job_id)
    await _change(parts, job_id, first, request, seconds=min(wait, parts.settings.http.max_wait_seconds))
    async with parts.database.read() as session:
        return await shown(session, await _found(session, caller.tenant.id, job_id))


async def _change(parts: Parts, job_id: str, first: Look | None, request: Request, *, seconds: float) -> None:
    """Wait until the job looks different, or there is no reason to wait any more. No session is held in between."""
    clock_of = asyncio.get_running_loop().time
    deadline = clock_of() + seconds
    while (left := deadline - clock_of()) > 0 and not parts.stopping.is_set() and not await request.is_disconnected():
        with suppress(TimeoutError):
            await asyncio.wait_for(parts.stopping.wait(), min(left, LOOK_SECONDS))
        async with parts.database.read() as session:
            if await repository.look(session, job_id) != first:
                return


@router.get(
    "/{job_id}/events",
    response_model=EventList,
    responses={
        200: {"content": {sse.MEDIA_TYPE: {"schema": {"type": "string"}}}},
        204: {"description": "A stream was asked for, and the job has ended with no event behind the last one known."},
        **declare("not_found", "too_many_streams"),
    },
)
async def list_events(
    job_id: str,
    parts: PartsDep,
    caller: JobsReader,
    *,
    after: Annotated[int, Query(ge=0, le=_MAX_SEQ, description="The `seq` of the last event that is known.")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000, description="Of a list; a stream has none.")] = 100,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
    last_event_id: Annotated[
        int | None,
        Header(alias="Last-Event-ID", ge=0, le=_MAX_SEQ, description="Where a stream goes on; it counts more than `after`."),
    ] = None,
) -> Response | EventList:
    """What happened to the job, oldest first.

    With `Accept: text/event-stream` the events are streamed as they happen, up to the job's end: `id` is `seq`, `event` is
    `type`, `data` an event as in the list. While nothing happens there is a comment now and then.
    """
    if sse.is_wanted(accept):
        return await _stream(parts, caller, job_id, after if last_event_id is None else last_event_id)
    async with parts.database.read() as session:
        await _found(session, caller.tenant.id, job_id)
        events = await repository.events_after(session, job_id, after, limit + 1)
    return EventList(data=[Event.model_validate(event) for event in events[:limit]], has_more=len(events) > limit)


async def _stream(parts: Parts, caller: Caller, job_id: str, after: int) -> Response:
    async with parts.database.read() as session:
        job = await _found(session, caller.tenant.id, job_id)
    ended = job.status in TERMINAL
    if ended and after >= job.event_seq:
        return Response(status_code=204)  # a browser does not open the stream once more
    follower = parts.broadcaster.join(job_id, seq=job.event_seq, tenant_id=caller.tenant.id, key_id=caller.key_id)
    frames = parts.broadcaster.frames(follower, after=after, ended=ended)
    return sse.EventStream(frames, on_end=lambda: parts.broadcaster.leave(follower))


@router.get("/{job_id}/report", responses=declare("not_found", "job_not_finished"))
async def get_report(job_id: str, parts: PartsDep, caller: JobsReader) -> dict[str, Any]:
    """Facts per block and per linear: sparsity, error, fallbacks, seconds."""
    async with parts.database.read() as session:
        job = await _found(session, caller.tenant.id, job_id)
        report = await repository.report_of(session, job_id)
    if report is not None:
        return report
    if job.status in TERMINAL:
        raise ProblemError("not_found", f"job {job_id} has {job.status} and left no report")
    raise ProblemError("job_not_finished", f"job {job_id} is {job.status}; there is a report when it has succeeded")


@router.get("/{job_id}/attempts", responses=declare("not_found"))
async def list_attempts(job_id: str, parts: PartsDep, caller: JobsReader) -> AttemptList:
    """Who worked on the job, and how each of them left it."""
    async with parts.database.read() as session:
        await _found(session, caller.tenant.id, job_id)
        attempts = await repository.attempts_of(session, job_id)
    return AttemptList(data=[Attempt.model_validate(attempt) for attempt in attempts])


@router.get("/{job_id}/artifacts", responses=declare("not_found"))
async def list_artifacts(job_id: str, parts: PartsDep, caller: ArtifactsReader) -> ArtifactList:
    """The files that the job made: none before it has succeeded."""
    async with parts.database.read() as session:
        await _found(session, caller.tenant.id, job_id)
        files = await repository.artifacts_of(session, [job_id])
    return ArtifactList(data=[Artifact.model_validate(file) for file in files[job_id]])


async def _found(session: AsyncSession, tenant_id: str, job_id: str) -> JobRow:
    job = await repository.find(session, tenant_id, job_id)
    if job is None:
        raise service.missing(job_id)
    return job


async def shown(session: AsyncSession, job: JobRow) -> Job:
    """The job as it is answered."""
    files, taken = await repository.artifacts_of(session, [job.id]), await integrations.of_jobs(session, [job.id])
    waiting = await waiting_of(session, [job], at=clock.now())
    return show(job, files[job.id], taken[job.id], waiting.get(job.id))
