"""Where finished models can be taken."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class Integration(BaseModel):
    """A place where finished models can be taken."""

    name: str
    object: Literal["integration"] = "integration"
    summary: str
    secret: str | None = Field(description="The secret of the tenant's that it uses; stored by `PUT /v1/secrets/{name}`.")
    options: dict[str, Any] = Field(description="What may stand beside `name` in a job's `integrations`, as JSON Schema.")
    unavailable: str | None = Field(description="Why it cannot be used in this installation; null if it can.")


class IntegrationList(BaseModel):
    """All integrations."""

    data: list[Integration]
