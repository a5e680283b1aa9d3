"""The one shape of every error (RFC 9457, `application/problem+json`)."""

from __future__ import annotations

from pydantic import BaseModel, Field


class FaultBody(BaseModel):
    """One thing that is wrong in a request."""

    pointer: str = Field(
        description="JSON pointer into the body; `/query/…`, `/header/…` and `/path/…` name a parameter instead.",
        examples=["/sparsity/target"],
    )
    detail: str


class Problem(BaseModel):
    """What went wrong, where, and what to do about it."""

    type: str = Field(examples=["https://secateur.dev/errors/model-not-found"])
    title: str
    status: int
    detail: str
    code: str = Field(description="Stable name of the kind of problem.", examples=["model_not_found"])
    retryable: bool = Field(description="Whether the same request may succeed later.")
    hint: str | None = None
    errors: list[FaultBody] = []
    request_id: str | None = Field(
        default=None, description="Names the request in the service's log. A job's error has none."
    )
