"""What can be asked of the service, one function a call."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, RootModel, ValidationError

from secateur._http import (
    Call,
    Emit,
    Open,
    Pause,
    Read,
    Reply,
    Request,
    Stream,
    failure,
    is_good,
    is_transient,
    pause_after,
    receive,
    send,
)
from secateur._sse import Decoder
from secateur.errors import UnexpectedAnswerError, WaitTimeoutError
from secateur.recipes import JobRecipe
from secateur.schemas.artifacts import Artifact, ArtifactList
from secateur.schemas.estimates import Estimate
from secateur.schemas.events import Event, EventList
from secateur.schemas.jobs import TERMINAL, Attempt, AttemptList, Job
from secateur.schemas.methods import Method, MethodList
from secateur.schemas.models import Model, ModelPage
from secateur.schemas.pages import Page
from secateur.schemas.sweeps import Sweep, SweepPage, SweepRecipe
from secateur.schemas.webhooks import WebhookDelivery, WebhookDeliveryPage, WebhookEndpoint, WebhookEndpointPage

WAIT_SECONDS = 20.0
_SHORTEST_ROUND = 0.5
_HEARTBEAT_SECONDS = 15.0
_STREAM_TRIES = 8
_NO_MORE = 204
_WEBHOOKS = "/v1/webhook-endpoints"
_SWEEPS = "/v1/sweeps"
_SWEEP_ROUND = 2.0

Item = TypeVar("Item", bound=BaseModel)


def create_job(recipe: JobRecipe | Mapping[str, Any], *, idempotency_key: str | None = None) -> Call[Job]:
    """Submit a job, which is queued when this returns.

    `recipe` is that of any kind, such as a `PruneRecipe`, or the same as a mapping. The request carries an idempotency key
    (one of its own if none is given), so that it is repeated safely when an answer is lost.
    """
    return (yield from receive(Request("POST", "/v1/jobs", json=_body(recipe), headers=_idempotent(idempotency_key)), Job))


def estimate_job(recipe: JobRecipe | Mapping[str, Any]) -> Call[Estimate]:
    """What a job of this recipe would cost: memory, disk, seconds. Nothing is queued."""
    return (yield from receive(Request("POST", "/v1/estimates", json=_body(recipe)), Estimate))


def get_job(job_id: str) -> Call[Job]:
    """The job as it is now."""
    return (yield from receive(Request("GET", _of_job(job_id)), Job))


def list_jobs(
    *,
    status: Collection[str] = (),
    method: str | None = None,
    model: str | None = None,
    created_after: datetime | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Stream[Job]:
    """All jobs that match, newest first; pages are fetched as the loop needs them."""
    named = {"method": method, "model": model, "created_after": created_after.isoformat() if created_after else None}
    parameters = [("status", one) for one in status]
    parameters += [(name, value) for name, value in named.items() if value is not None]
    parameters += [(f"metadata[{key}]", value) for key, value in (metadata or {}).items()]
    yield from _pages("/v1/jobs", parameters, Page[Job])


def cancel_job(job_id: str) -> Call[Job]:
    """Cancel a job: at once if it is queued, soon if it is running. May be repeated."""
    return (yield from receive(Request("POST", f"{_of_job(job_id)}/cancel"), Job))


def delete_job(job_id: str) -> Call[None]:
    """Remove the files and the report of a job that has ended. May be repeated."""
    yield from send(Request("DELETE", _of_job(job_id)))


def retry_job(job_id: str, *, idempotency_key: str | None = None) -> Call[Job]:
    """A new job with the recipe of one that failed, expired or was cancelled."""
    return (yield from receive(Request("POST", f"{_of_job(job_id)}/retry", headers=_idempotent(idempotency_key)), Job))


def events_of_job(job_id: str, *, after: int = 0) -> Stream[Event]:
    """What has happened to the job, oldest first, from the event behind number `after` on."""
    more = True
    while more:
        page = yield from receive(Request("GET", f"{_of_job(job_id)}/events", (("after", str(after)),)), EventList)
        for event in page.data:
            after = event.seq
            yield Emit(event)
        more = page.has_more and bool(page.data)


def stream_events(job_id: str, *, after: int = 0) -> Stream[Event]:
    """What happens to the job, while it happens, from the event behind number `after` on; ends with the job.

    Each event comes once: a stream that breaks off is opened again where it was. Raises UnreachableError if that fails for
    about half a minute.
    """
    tries, retry_seconds = 0, 0.0
    while True:
        outcome = yield Open(_event_stream(job_id, after))
        if is_good(outcome):
            if outcome.status == _NO_MORE:
                return
            tries, decoder = 0, _decoder(outcome)
            while piece := (yield Read()):
                for data in decoder.feed(piece):
                    event = _event(data)
                    after = event.seq
                    yield Emit(event)
                    if event.type == "status" and event.data["status"] in TERMINAL:
                        return
            retry_seconds = decoder.retry_seconds
        tries += 1
        if not is_good(outcome) and (tries == _STREAM_TRIES or not is_transient(outcome)):
            raise failure(outcome)
        yield Pause(max(pause_after(tries, outcome), min(retry_seconds, WAIT_SECONDS)))


def _event_stream(job_id: str, after: int) -> Request:
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
    return Request("GET", f"{_of_job(job_id)}/events", headers=headers, patience=_HEARTBEAT_SECONDS)


def _decoder(reply: Reply) -> Decoder:
    if not reply.headers.get("content-type", "").startswith("text/event-stream"):
        raise UnexpectedAnswerError("The service sent no stream of events. Its version may be too old for this client.")
    return Decoder()


def _event(data: str) -> Event:
    try:
        return Event.model_validate_json(data)
    except ValidationError as error:
        raise UnexpectedAnswerError("An event is not what this client knows; its version may be too old.") from error


def watch_job(job_id: str) -> Stream[Job]:
    """The job now, and again whenever it has changed, up to and with its end."""
    job = yield from get_job(job_id)
    yield Emit(job)
    while job.status not in TERMINAL:
        later = yield from _after_a_change(job_id, WAIT_SECONDS)
        if later != job:
            job = later
            yield Emit(job)


def wait_for_job(job_id: str, *, timeout: float = math.inf) -> Call[Job]:
    """The job when it has ended, well or not: look at its `status`. Raises WaitTimeoutError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    job = yield from get_job(job_id)
    while job.status not in TERMINAL:
        left = min(deadline - time.monotonic(), WAIT_SECONDS)
        if left <= 0:
            raise WaitTimeoutError(f"Job {job_id} is still {job.status} after {timeout:g} seconds.")
        job = yield from _after_a_change(job_id, left)
    return job


def retry_integrations(job_id: str) -> Call[Job]:
    """Have the job's integrations that failed, or wait for their next try, tried again now."""
    return (yield from receive(Request("POST", f"{_of_job(job_id)}/integrations/retry"), Job))


def report_of_job(job_id: str) -> Call[dict[str, Any]]:
    """Facts per block and per linear: sparsity, error, fallbacks, seconds."""
    return (yield from receive(Request("GET", f"{_of_job(job_id)}/report"), RootModel[dict[str, Any]])).root


def artifacts_of_job(job_id: str) -> Call[list[Artifact]]:
    """The files that the job made, by name."""
    return (yield from receive(Request("GET", f"{_of_job(job_id)}/artifacts"), ArtifactList)).data


def attempts_of_job(job_id: str) -> Call[list[Attempt]]:
    """Who worked on the job, and how each of them left it, oldest first."""
    return (yield from receive(Request("GET", f"{_of_job(job_id)}/attempts"), AttemptList)).data


def create_sweep(recipe: SweepRecipe | Mapping[str, Any], *, idempotency_key: str | None = None) -> Call[Sweep]:
    """Submit a job for each method and sparsity of `recipe`, a `SweepRecipe` or the same as a mapping: all, or none."""
    return (yield from receive(Request("POST", _SWEEPS, json=_body(recipe), headers=_idempotent(idempotency_key)), Sweep))


def get_sweep(sweep_id: str) -> Call[Sweep]:
    """The sweep as it is now, with its table."""
    return (yield from receive(Request("GET", _of_sweep(sweep_id)), Sweep))


def list_sweeps() -> Stream[Sweep]:
    """All sweeps, newest first."""
    yield from _pages(_SWEEPS, [], SweepPage)


def cancel_sweep(sweep_id: str) -> Call[Sweep]:
    """Cancel all jobs of the sweep that have not ended. May be repeated."""
    return (yield from receive(Request("POST", f"{_of_sweep(sweep_id)}/cancel"), Sweep))


def delete_sweep(sweep_id: str) -> Call[None]:
    """Remove a sweep whose jobs have ended, and their files."""
    yield from send(Request("DELETE", _of_sweep(sweep_id)))


def watch_sweep(sweep_id: str) -> Stream[Sweep]:
    """The sweep now, and again whenever a job of it has come to another state, up to and with the last one's end."""
    seen: list[str] = []
    while True:
        sweep = yield from get_sweep(sweep_id)
        if (states := [row.status for row in sweep.table]) != seen:
            seen = list(states)
            yield Emit(sweep)
        if sweep.progress.done == sweep.progress.total:
            return
        yield Pause(_SWEEP_ROUND)


def list_methods() -> Call[list[Method]]:
    """The methods that can prune, with their parameters as JSON Schema."""
    return (yield from receive(Request("GET", "/v1/methods"), MethodList)).data


def list_models() -> Stream[Model]:
    """The local models that can be pruned, and the pruned models."""
    yield from _pages("/v1/models", [], ModelPage)


def materialize_model(
    model_id: str, sparsity: float, *, allocation: Mapping[str, Any] | None = None, name: str | None = None
) -> Call[Job]:
    """A job that makes an ordinary model, of this sparsity, of an elastic one; the same one for the same request.

    `model_id`: the id of the job that made the elastic model, or its repository. `allocation`: how blocks and linears share
    the sparsity, evenly by default. `name`: what the model is to be called.
    """
    body: dict[str, Any] = {"sparsity": sparsity}
    body |= {"allocation": dict(allocation)} if allocation else {}
    body |= {"output": {"name": name}} if name else {}
    return (yield from receive(Request("POST", f"/v1/models/{quote(model_id)}/materialize", json=body), Job))


def set_hub_token(token: str) -> Call[None]:
    """Have the service ask the hub with this token, to read and to push. It is kept encrypted and never shown."""
    yield from set_secret("hub_token", token)


def forget_hub_token() -> Call[None]:
    """Have the service ask the hub without a token again."""
    yield from forget_secret("hub_token")


def set_secret(name: str, value: str) -> Call[None]:
    """Store a secret, such as `mlflow_token`. It is kept encrypted and never shown."""
    yield from send(Request("PUT", f"/v1/secrets/{quote(name, safe='')}", json={"value": value}))


def forget_secret(name: str) -> Call[None]:
    """Delete a stored secret."""
    yield from send(Request("DELETE", f"/v1/secrets/{quote(name, safe='')}"))


def create_webhook(
    url: str, *, types: Collection[str] = (), description: str = "", idempotency_key: str | None = None
) -> Call[WebhookEndpoint]:
    """Have an address told what happens to jobs. The answer's `secret` is shown this once."""
    body = {"url": url, "types": list(types), "description": description}
    request = Request("POST", _WEBHOOKS, json=body, headers=_idempotent(idempotency_key))
    return (yield from receive(request, WebhookEndpoint))


def list_webhooks() -> Stream[WebhookEndpoint]:
    """The addresses that are told, newest first."""
    yield from _pages(_WEBHOOKS, [], WebhookEndpointPage)


def delete_webhook(endpoint_id: str) -> Call[None]:
    """Tell an address nothing any more."""
    yield from send(Request("DELETE", _of_webhook(endpoint_id)))


def ping_webhook(endpoint_id: str) -> Call[WebhookDelivery]:
    """Send a message to try an address out."""
    return (yield from receive(Request("POST", f"{_of_webhook(endpoint_id)}/ping"), WebhookDelivery))


def deliveries_to_webhook(endpoint_id: str) -> Stream[WebhookDelivery]:
    """What an address was told and how that went, newest first."""
    yield from _pages(f"{_of_webhook(endpoint_id)}/deliveries", [], WebhookDeliveryPage)


def _pages(path: str, parameters: list[tuple[str, str]], shape: type[Page[Item]]) -> Stream[Item]:
    cursor: str | None = ""
    while cursor is not None:
        page = yield from receive(Request("GET", path, [*parameters, *([("cursor", cursor)] if cursor else [])]), shape)
        for item in page.data:
            yield Emit(item)
        cursor = page.next_cursor if page.has_more else None


def _after_a_change(job_id: str, seconds: float) -> Call[Job]:
    """The job after its next change, or after `seconds` if there is none."""
    began = time.monotonic()
    job = yield from receive(Request("GET", _of_job(job_id), (("wait", f"{seconds:.3f}"),), patience=seconds), Job)
    if (spent := time.monotonic() - began) < min(seconds, _SHORTEST_ROUND):
        yield Pause(min(seconds, _SHORTEST_ROUND) - spent)  # a job that changes without end, or a server that does not wait
    return job


def _of_sweep(sweep_id: str) -> str:
    return f"{_SWEEPS}/{quote(sweep_id, safe='')}"


def _body(recipe: JobRecipe | Mapping[str, Any]) -> dict[str, Any]:
    return recipe.model_dump(mode="json") if isinstance(recipe, JobRecipe) else dict(recipe)


def _of_webhook(endpoint_id: str) -> str:
    return f"{_WEBHOOKS}/{quote(endpoint_id, safe='')}"


def _of_job(job_id: str) -> str:
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _idempotent(key: str | None) -> Mapping[str, str]:
    return {"Idempotency-Key": key or str(uuid.uuid4())}
