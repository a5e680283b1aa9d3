"""A recipe for a model of the hub, and the admission of it as somebody asks for it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from app.accounts.models import Tenant
from app.accounts.secrets import SecretName
from app.models import sources
from app.settings import Settings
from secateur.problems import ProblemError
from secateur.recipes import PruneRecipe, Recipe

TOKEN = "hf_the_tenants_own_token"
OTHER = "hf_of_somebody_else"


def tenant_of(*, local: bool = True, name: str = "a") -> Tenant:
    return Tenant(id=f"ten_{name}", slug=name, reads_local_models=local, created_at=datetime.now(UTC))


def recipe_of(model: str = "acme/tiny", *, source: str = "hub", revision: str | None = None, **more: Any) -> PruneRecipe:
    document = {
        "kind": "prune",
        "model": {"source": source, "id": model, "revision": revision},
        "method": {"name": "wanda"},
        "sparsity": {"target": 0.5},
        "calibration": {"samples": 2, "sequence_length": 16},
    }
    return PruneRecipe.model_validate(document | more)


async def admit(settings: Settings, recipe: Recipe, token: str | None = None, *, tenant: Tenant | None = None) -> Recipe:
    tokens = {SecretName.HUB_TOKEN: token}
    return (await sources.admit(recipe, tenant=tenant or tenant_of(), tokens=tokens, settings=settings)).recipe


async def refused(
    settings: Settings, recipe: Recipe, token: str | None = None, *, tenant: Tenant | None = None
) -> ProblemError:
    with pytest.raises(ProblemError) as refused:
        await admit(settings, recipe, token, tenant=tenant)
    return refused.value


def pointer(problem: ProblemError) -> str:
    return problem.faults[0].pointer


def with_tensor(content: bytes, name: str, dtype: str, shape: list[int], size: int) -> tuple[bytes, int]:
    """A safetensors file with one more tensor of `size` bytes, which are left out, and the size that it would have."""
    length = int.from_bytes(content[:8], "little")
    header, end = json.loads(content[8 : 8 + length]), len(content) - 8 - length
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + content[8 + length :], 8 + len(raw) + end + size
