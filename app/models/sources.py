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
from secateur.pruning.headers import ModelHeaders
from secateur.recipes import ModelRecipe, PruneRecipe, Recipe

# Threads of their own: a hub that hangs must not hold up those that read artifacts.
_remote_threads = ThreadPoolExecutor(8, thread_name_prefix="hub")
_OUTPUT_BYTES = {"bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class Admitted:
    """A recipe as it can be queued, and the bytes of memory that its run needs."""

    recipe: Recipe
    memory: int


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


def _admit_local(recipe: Recipe, settings: Settings) -> Admitted:
    with _about_the_model(), parsing.one_at_a_time:
        headers = local.headers_of(recipe.model.id, settings.models_root)
        admission.check(recipe, headers)
        wanted = room_for(recipe, headers, local_store=_is_local(settings))
    _require_room(wanted, settings)
    return Admitted(recipe, memory_for(recipe, headers))


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
            wanted = room_for(recipe, headers, local_store=_is_local(settings))
    model = recipe.model.model_copy(update={"id": snapshot.repository, "revision": snapshot.commit})
    if not cached(model, tenant_id=tenant_id, settings=settings):
        wanted += sum(file.size for file in files)
    _require_room(wanted, settings)
    return Admitted(recipe.model_copy(update={"model": model}), memory_for(recipe, headers))


def memory_for(recipe: Recipe, headers: ModelHeaders) -> int:
    """Bytes of memory that a run takes at its height: two blocks, and the activations of the calibration before and behind
    the block. A GGUF file's config is not read at admission; of it, the whole is taken for two blocks."""
    layers, hidden = (int(headers.config.get(name, 1)) for name in ("num_hidden_layers", "hidden_size"))
    tokens = recipe.calibration.samples * recipe.calibration.sequence_length if isinstance(recipe, PruneRecipe) else 0
    elements = 2 * (headers.parameters or headers.bytes) // layers + 2 * tokens * hidden
    return _OUTPUT_BYTES[recipe.compute_dtype] * elements


def room_for(recipe: Recipe, headers: ModelHeaders, *, local_store: bool) -> int:
    """Bytes of disk that a run takes at its height: the finished blocks, the files gathered from them and, if the store is
    on this disk, what it keeps. Of a GGUF model the parameters are taken to be as many as its bytes, which lies between the
    common quantisations, and there is a dequantised copy before the run. A job that writes no model takes no more."""
    parameters = headers.parameters or headers.bytes
    converted = parameters * _OUTPUT_BYTES["bfloat16"] if headers.format == "gguf" else 0
    if not isinstance(recipe, ModelRecipe):
        return converted
    return converted + parameters * _OUTPUT_BYTES[recipe.output.dtype] * (3 if local_store else 2)


def _is_local(settings: Settings) -> bool:
    return settings.store_url.startswith("file:")


def _require_room(wanted: int, settings: Settings) -> None:
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
