"""A job as the API shows it."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from secateur.recipes import Kind, Recipe
from secateur.schemas.artifacts import Artifact
from secateur.schemas.pages import Page
from secateur.schemas.problems import Problem


class Status(StrEnum):
    """Where a job is in its life; the last four are terminal."""

    QUEUED = "queued"
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


TERMINAL = frozenset({Status.SUCCEEDED, Status.FAILED, Status.CANCELLED, Status.EXPIRED})


class Outcome(StrEnum):
    """How an attempt ended; whether the job is tried again is told by the job's status."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"
    DRAINED = "drained"
    OUT_OF_MEMORY = "out_of_memory"


Stage = Literal["resolving", "downloading", "calibrating", "pruning", "evaluating", "packaging", "uploading"]


class Progress(BaseModel):
    """How far the present stage is."""

    done: int
    total: int
    unit: str = Field(examples=["blocks"])
    eta_seconds: float | None = Field(default=None, description="Seconds to the end of this stage, guessed.")


class Waiting(BaseModel):
    """How a queued job stands."""

    position: int = Field(description="1 is the next one of its queue.")
    workers: int | None = Field(
        description="Workers that serve the queue. 0: none does at the moment, and the job waits for one; null: not known."
    )
    eta_seconds: float | None = Field(description="Seconds until it begins, guessed from how long the queue's jobs took.")


class Perplexity(BaseModel):
    """Perplexity with the protocol that it was measured by: before and after, or of a model that was only evaluated."""

    model_config = ConfigDict(extra="allow")

    dense: float | None = None
    pruned: float | None = None
    value: float | None = Field(default=None, description="Of the model of a job of kind `evaluate`.")
    protocol: dict[str, Any] | None = None


class Seconds(BaseModel):
    """How long the stages took, by name; `total` is the whole run."""

    model_config = ConfigDict(extra="allow")

    prune: float | None = Field(
        default=None,
        description="From the load of the first block to the end of the last one's file, those of earlier attempts whose "
        "blocks were taken over included. Neither the final files nor an evaluation are in it.",
    )
    evaluate: float | None = Field(
        default=None,
        description="The pruned model's evaluation; in a job of kind `evaluate` its model's, if that was not known before.",
    )
    total: float | None = None


class CurvePoint(BaseModel):
    """Perplexity at one sparsity: of the elastic model (`epts`), and of the methods that were run beside it."""

    sparsity: float
    perplexity: dict[str, float]


class Metrics(BaseModel):
    """What was measured."""

    model_config = ConfigDict(extra="allow")

    sparsity: float | None = Field(default=None, description="Zeros over the pruned linears, counted in the written file.")
    perplexity: Perplexity | None = None
    curve: list[CurvePoint] | None = Field(default=None, description="Of an elastic model, in the order that was asked.")
    seconds: Seconds | None = None
    forward_multiple: float | None = Field(
        default=None,
        description="`seconds.prune` over the seconds that one forward of the calibration's tokens through all blocks would "
        "take, at the pace of the pruned model's evaluation. Without one it is left out.",
    )
    peak_memory_bytes: int | None = None
    operations_per_second: float | None = Field(
        default=None, description="The worker's pace, as `POST /v1/estimates` counts operations: later estimates go by it."
    )


class JobIntegration(BaseModel):
    """Where a job's output is taken, and how that goes. It never changes the job itself."""

    name: str
    status: Literal["waiting", "pending", "running", "succeeded", "failed", "skipped"] = Field(
        description="`waiting` for the job's success, `pending` for a try, `skipped` if the job had no success."
    )
    attempts: int
    next_try_at: datetime | None
    url: str | None = Field(description="Where a person finds it.")
    error: Problem | None = Field(description="Why the last try failed.")


class Job(BaseModel):
    """A job: what was asked, how far it is, what came of it."""

    id: str
    object: Literal["job"] = "job"
    kind: Kind
    status: Status
    stage: Stage | None
    progress: Progress | None
    queue: str = Field(description="`cpu`, or `gpu.24g` and so on: the smallest GPU that the job is thought to fit.")
    waiting: Waiting | None = Field(description="While it is queued; not yet in the answer to its submission.")
    attempt: int = Field(description="How often the job was begun; more than 1 if a worker was lost or drained.")
    recipe: Recipe = Field(description="As accepted: defaults filled, revision resolved.")
    metrics: Metrics | None
    artifacts: list[Artifact]
    integrations: list[JobIntegration]
    repository: str | None = Field(
        description="Name of the model that is made: the tenant's slug and `output.name`. None if the kind makes no model."
    )
    retry_of: str | None
    error: Problem | None
    artifacts_expire_at: datetime | None = Field(default=None, description="When the files are removed, or were.")
    created_at: datetime
    queued_at: datetime
    started_at: datetime | None
    cancelling_at: datetime | None
    finished_at: datetime | None
    deleted_at: datetime | None = Field(default=None, description="What is left of the job then is a tombstone.")


class Attempt(BaseModel):
    """One worker's try at a job."""

    model_config = ConfigDict(from_attributes=True)

    number: int
    worker: str = Field(description="Host and process.")
    queue: str
    blocks_done: int = Field(
        description="Finished blocks of the job when the attempt ended, those of earlier ones included."
    )
    started_at: datetime
    ended_at: datetime | None
    outcome: Outcome | None = Field(
        description="`lost` if its worker was killed or fell silent, `drained` if the worker was told to stop."
    )


class AttemptList(BaseModel):
    """The attempts at a job, oldest first."""

    data: list[Attempt]


class JobPage(Page[Job]):
    """Jobs, newest first."""
