"""A sweep: one model pruned by several methods to several sparsities, a job each, and a table of what came of it."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from secateur.recipes import (
    Allocation,
    Method,
    Output,
    PruneRecipe,
    PruneSettings,
    Sparsity,
    UniformAllocation,
    known_pattern,
)
from secateur.schemas.jobs import Status
from secateur.schemas.pages import Page

MAX_JOBS = 64
_MAX_LIST = 16

Target = Annotated[float, Field(gt=0, lt=1)]


def _n_of_m(pattern: str) -> str:
    if pattern == "unstructured":
        raise PydanticCustomError("pattern", "an N:M pattern is expected here, such as '2:4'; other targets are sparsities")
    return known_pattern(pattern)


class SweepRecipe(PruneSettings):
    """Prune a model by each of `methods` to each of `sparsities` and `patterns`: the body of `POST /v1/sweeps`.

    The rest is as in a job's body, and the same for all of them.
    """

    kind: Literal["prune"] = "prune"
    methods: Annotated[list[Method], Field(min_length=1, max_length=_MAX_LIST)]
    sparsities: Annotated[list[Target], Field(max_length=_MAX_LIST)] = Field(
        default=[], description="Targets of unstructured sparsity.", examples=[[0.5, 0.6, 0.7]]
    )
    patterns: Annotated[list[Annotated[str, AfterValidator(_n_of_m)]], Field(max_length=_MAX_LIST)] = Field(
        default=[], description="N:M patterns.", examples=[["2:4"]]
    )
    allocation: Allocation = Field(default=UniformAllocation(), description="How the unstructured ones share their target.")

    @field_validator("methods", "sparsities", "patterns")
    @classmethod
    def _once_each(cls, items: list[Any]) -> list[Any]:
        if any(item in items[:index] for index, item in enumerate(items)):
            raise PydanticCustomError("twice", "the same is given twice")
        return items

    @field_validator("output")
    @classmethod
    def _names_itself(cls, output: Output) -> Output:
        if output.name is not None:
            raise PydanticCustomError("output_name", "each output of a sweep is named by its method and sparsity")
        return output

    @model_validator(mode="after")
    def _has_jobs(self) -> Self:
        cells = len(self.methods) * len(self.cells)
        if cells == 0:
            raise PydanticCustomError("no_jobs", "give sparsities, patterns, or both")
        if cells > MAX_JOBS:
            raise PydanticCustomError(
                "too_many_jobs", "this makes {cells} jobs; a sweep has at most {most}", {"cells": cells, "most": MAX_JOBS}
            )
        return self

    @property
    def cells(self) -> list[Sparsity]:
        """The sparsities and then the patterns: a column of the table each."""
        unstructured = [Sparsity(target=target, allocation=self.allocation) for target in self.sparsities]
        return unstructured + [Sparsity.model_validate({"pattern": pattern}) for pattern in self.patterns]

    def recipes(self) -> list[PruneRecipe]:
        """The recipe of each job, method by method. Methods of one name are told apart by a number behind the output's."""
        shared = {name: getattr(self, name) for name in PruneSettings.model_fields}
        made = []
        for index, method in enumerate(self.methods):
            earlier = sum(other.name == method.name for other in self.methods[:index])
            for sparsity in self.cells:
                recipe = PruneRecipe.model_validate(shared | {"kind": "prune", "method": method, "sparsity": sparsity})
                if earlier:
                    output = recipe.output.model_copy(update={"name": f"{recipe.name[:92]}-{earlier + 1}"})
                    recipe = recipe.model_copy(update={"output": output})
                made.append(recipe)
        return made


class SweepRow(BaseModel):
    """A job of a sweep, as far as the table has it; `GET /v1/jobs/{id}` has the rest."""

    job_id: str
    method: dict[str, Any]
    pattern: str
    target: float
    status: Status
    repository: str | None
    sparsity: float | None = Field(description="As measured in the written file.")
    perplexity_dense: float | None
    perplexity_pruned: float | None
    seconds: float | None = Field(description="Of the whole run.")


class SweepProgress(BaseModel):
    """How many of the jobs have ended, well or not."""

    done: int
    total: int
    unit: Literal["jobs"] = "jobs"


class Sweep(BaseModel):
    """A sweep: what was asked, how far its jobs are, what was measured."""

    id: str
    object: Literal["sweep"] = "sweep"
    status: Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"] = Field(
        description="`succeeded` if all jobs have; `cancelled` if some were and none failed."
    )
    progress: SweepProgress
    recipe: SweepRecipe = Field(description="As accepted: defaults filled, revision resolved.")
    table: list[SweepRow] = Field(description="A row a job, in the order of methods, then sparsities, then patterns.")
    created_at: datetime
    finished_at: datetime | None


class SweepPage(Page[Sweep]):
    """Sweeps, newest first."""
