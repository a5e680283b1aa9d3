"""The methods that can prune."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Method(BaseModel):
    """What a method does, what it takes and what it costs."""

    model_config = ConfigDict(from_attributes=True)

    name: str
    object: Literal["method"] = "method"
    summary: str
    kind: str = Field(description="The kind of job that takes it.", examples=["prune"])
    paper: str | None = Field(description="Where it was published.", examples=["https://arxiv.org/abs/2306.11695"])
    patterns: list[str] = Field(examples=[["unstructured", "N:M"]])
    cost: str
    parameters: dict[str, Any] = Field(description="JSON Schema of what stands beside `name`.")


class MethodList(BaseModel):
    """All methods, by name."""

    data: list[Method]
