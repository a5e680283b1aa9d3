"""Admission of a model: it is resolved and checked against the recipe before a job is queued."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass

from app.accounts.models import Tenant
from app.accounts.secrets import SecretName
from app.kit.disk import free_bytes
from app.models import hub, local, mlflow, parsing
from app.models.artifact import Made
from app.models.fetch import Tokens, cached
from app.models.hub import Hub, Reader, Snapshot
from app.models.mlflow import Mlflow
from app.settings import Settings
from secateur.problems import ProblemError, at
from secateur.pruning import admission
from secateur.pruning.estimate import Estimate, estimate
from secateur.pruning.headers import ModelHeaders
from secateur.recipes import Recipe

# Threads of their own: a hub that hangs must not hold up those that read artifacts.
_remote_threads = ThreadPoolExecutor(8, thread_name_prefix="hub")


@dataclass(frozen=True, slots=True)
class Admitted:
    """A recipe as it can be queued, what its run will cost, and what its model says of itself."""

    recipe: Recipe
    estimate: Estimate
    headers: ModelHeaders


async def admit(recipe: Recipe, *, tenant: Tenant, tokens: Tokens, settings: Settings, made: Made | None = None) -> Admitted:
    """The recipe as it can be queued: a hub revision is resolved to a commit, an MLflow alias to a version, `made` to a job.

    Only config and headers are read. Raises ProblemError, each with a pointer into the recipe: those of `app.models.local`,
    `app.models.hub`, `app.models.mlflow` and `secateur.pruning.admission`, and `model_too_large_for_disk`.
    """
    if recipe.model.source == "local":
        if not tenant.reads_local_models:
            raise local.not_found(recipe.model.id)
        return await asyncio.to_thread(_admit_local, recipe, settings)
    if made is not None:
        return await asyncio.get_running_loop().run_in_executor(
            _remote_threads, _admit_snapshot, recipe, made, made.snapshot, tenant.id, settings
        )
    from_mlflow = recipe.model.source == "mlflow"
    admit_remote, source = (_admit_mlflow, mlflow) if from_mlflow else (_admit_hub, hub)
    token = tokens.get(SecretName.MLFLOW_TOKEN if from_mlflow else SecretName.HUB_TOKEN)
    seconds = settings.mlflow.timeout_seconds if from_mlflow else settings.hub.timeout_seconds
    try:
        async with asyncio.timeout(seconds + 1):
            running = asyncio.get_running_loop()
            return await running.run_in_executor(_remote_threads, admit_remote, recipe, tenant.id, token, settings)
    except TimeoutError:
        raise source.unavailable("did not answer in time") from None


def admit_also(first: Admitted, recipe: Recipe, settings: Settings) -> Admitted:
    """Another recipe on the model of one that was admitted, which is not read again. Raises what `admission.check` does."""
    with _about_the_model():
        admission.check(recipe, first.headers)
    cost = estimate(recipe, first.headers, local_store=_is_local(settings))
    return Admitted(recipe.model_copy(update={"model": first.recipe.model}), cost, first.headers)


def _admit_local(recipe: Recipe, settings: Settings) -> Admitted:
    with _about_the_model(), parsing.one_at_a_time:
        headers = local.headers_of(recipe.model.id, settings.models_root)
        admission.check(recipe, headers)
        cost = estimate(recipe, headers, local_store=_is_local(settings))
    require_room(cost.disk_bytes, settings)
    return Admitted(recipe, cost, headers)


def _admit_hub(recipe: Recipe, tenant_id: str, token: str | None, settings: Settings) -> Admitted:
    reader = Hub(settings.hub.endpoint, token, settings.hub.timeout_seconds)
    with _about_the_model():
        snapshot = reader.snapshot(recipe.model)
    return _admit_snapshot(recipe, reader, snapshot, tenant_id, settings)


def _admit_mlflow(recipe: Recipe, tenant_id: str, token: str | None, settings: Settings) -> Admitted:
    with closing(Mlflow(settings, token, settings.mlflow.timeout_seconds)) as reader:
        snapshot = reader.snapshot(recipe.model)
        return _admit_snapshot(recipe, reader, snapshot, tenant_id, settings)


def _admit_snapshot(recipe: Recipe, reader: Reader, snapshot: Snapshot, tenant_id: str, settings: Settings) -> Admitted:
    with _about_the_model():
        description = hub.describe(reader, snapshot)
        files = hub.selected(snapshot, list(description.headers))
        with parsing.one_at_a_time:
            headers = hub.headers_of(description, snapshot)
            admission.check(recipe, headers)
            cost = estimate(recipe, headers, local_store=_is_local(settings))
    model = recipe.model.model_copy(update={"id": snapshot.repository, "revision": snapshot.commit})
    here = cached(model, tenant_id=tenant_id, settings=settings)
    require_room(cost.disk_bytes + (0 if here else sum(file.size for file in files)), settings)
    return Admitted(recipe.model_copy(update={"model": model}), cost, headers)


def _is_local(settings: Settings) -> bool:
    return settings.store_url.startswith("file:")


def require_room(wanted: int, settings: Settings) -> None:
    """Raise `model_too_large_for_disk` unless so many bytes are free where the state lies."""
    free = max(0, free_bytes(settings.state_folder) - settings.disk.reserve_bytes)
    if wanted > free:
        raise at(
            "/model/id",
            "model_too_large_for_disk",
            f"The model and what is made of it need {wanted / 1e9:.1f} GB of disk; {free / 1e9:.1f} GB are free.",
            hint="Choose a smaller model, or ask the operator for a larger disk.",
        )


@contextmanager
def _about_the_model() -> Iterator[None]:
    """A problem of the model's files points at the model."""
    try:
        yield
    except ProblemError as error:
        if error.faults:
            raise
        raise at("/model/id", error.code, error.detail, hint=error.hint) from error
