"""What a job would cost."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from secateur.recipes import Recipe


class Tokens(BaseModel):
    """Tokens that run through the model."""

    calibration: int
    evaluation: int = Field(description="About so many: the text is tokenised by the run.")


class Range(BaseModel):
    """Between two numbers."""

    low: float
    high: float


class Pace(BaseModel):
    """The speed that the seconds were counted with."""

    operations_per_second: float
    measured: bool = Field(
        description="Whether it is that of the latest jobs of this queue; if not, a default that may be far off."
    )


class Estimate(BaseModel):
    """What a job would cost, from the model's config and headers alone."""

    object: Literal["estimate"] = "estimate"
    recipe: Recipe = Field(description="As it would be accepted: defaults filled, revision resolved.")
    parameters: int
    pruned_parameters: int = Field(description="Weights of the linears that are pruned.")
    tokens: Tokens
    operations: float = Field(description="Floating-point operations of forwards, statistics and solves.")
    peak_memory_bytes: int = Field(description="Of the process that runs the job, on a machine without a GPU.")
    device_memory_bytes: int = Field(description="The part of it that a GPU would hold.")
    disk_bytes: int = Field(description="Of the worker's disk; a model that has to be downloaded comes on top.")
    seconds: Range = Field(description="From its beginning to its end; the time in the queue comes on top.")
    pace: Pace
    queue: str
    warnings: list[str]
