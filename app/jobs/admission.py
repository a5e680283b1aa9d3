"""Whether a job can be accepted: its model found and read, its recipe settled, its cost estimated, its queue chosen."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts.auth import Caller
from app.accounts.keys import Scope
from app.accounts.secrets import SecretName, secret_of
from app.integrations import registry
from app.jobs import routing
from app.kit.disk import require_reserve
from app.models import artifact, sources
from app.models.artifact import Made
from app.models.sources import Admitted
from app.parts import Parts
from app.settings import Settings
from secateur.problems import at
from secateur.pruning.estimate import Estimate
from secateur.recipes import ExportRecipe, Recipe

# What a route that admits a recipe may answer.
PROBLEMS = (
    "bad_request", "body_too_large", "forbidden", "service_unavailable", "validation_error",
    "model_not_found", "model_gone", "job_not_finished", "model_gated", "hub_token_refused", "hub_unavailable",
    "mlflow_token_refused", "mlflow_unavailable", "model_not_safetensors", "model_file_corrupt",
    "model_config_invalid", "remote_code_refused", "unsupported_architecture", "model_quantized", "model_too_large_for_disk",
    "integration_unavailable", "pattern_does_not_divide", "sequence_too_long", "calibration_text_too_short",
    "dataset_unavailable", "too_large_for_workers", "disk_almost_full",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Accepted:
    """A recipe with model and integrations resolved, what it will cost, and the queue that is chosen by it."""

    admitted: Admitted
    queue: str

    @property
    def recipe(self) -> Recipe:
        return self.admitted.recipe

    @property
    def estimate(self) -> Estimate:
        return self.admitted.estimate


async def admit(parts: Parts, caller: Caller, recipe: Recipe) -> Accepted:
    """Accept the recipe, if the caller may read the model and it fits. No session is held meanwhile.

    Raises the problems that `PROBLEMS` names.
    """
    if recipe.schedule.priority > 0 and not caller.may(Scope.ADMIN):
        raise at("/schedule/priority", "forbidden", "a priority above 0 passes other tenants by: the API key lacks admin")
    require_reserve(parts.settings.state_folder, parts.settings.disk.reserve_bytes)
    async with parts.database.read() as session:
        tokens = {name: await secret_of(session, caller.tenant.id, name, keyring=parts.keyring) for name in SecretName}
        made = await _made(session, parts, caller, recipe)
    settled = registry.settle(recipe, parts.settings)
    admitted = await sources.admit(settled, tenant=caller.tenant, tokens=tokens, settings=parts.settings, made=made)
    queues = parts.settings.jobs.queues
    needs_no_gpu = isinstance(recipe, ExportRecipe) and routing.CPU in queues
    return Accepted(admitted, routing.CPU if needs_no_gpu else routing.queue_for(admitted.estimate.device_bytes, queues))


async def admit_also(first: Accepted, recipe: Recipe, settings: Settings) -> Accepted:
    """Accept another recipe on the model of one that was accepted, with the integrations that were settled for that.

    The model is neither resolved nor read again. Raises the problems of `secateur.pruning.admission`.
    """
    settled = registry.settle(recipe, settings)
    admitted = await asyncio.to_thread(sources.admit_also, first.admitted, settled, settings)
    return Accepted(admitted, routing.queue_for(admitted.estimate.device_bytes, settings.jobs.queues))


def require_room(estimates: Sequence[Estimate], settings: Settings) -> None:
    """Raise `model_too_large_for_disk` if jobs of these estimates, one after the other, leave too little room."""
    kept = sum(estimate.kept_bytes for estimate in estimates)
    height = max(estimate.disk_bytes - estimate.kept_bytes for estimate in estimates)
    sources.require_room(kept + height, settings)


async def _made(session: AsyncSession, parts: Parts, caller: Caller, recipe: Recipe) -> Made | None:
    """The model, if it is one that a job made."""
    if recipe.model.source != "artifact":
        return None
    snapshot = await artifact.find(session, caller.tenant.id, recipe.model)
    return Made(snapshot, caller.tenant.id, parts.store, asyncio.get_running_loop())
