"""Models that can be pruned, and models that were."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from secateur import recipes
from secateur.schemas.pages import Page
from secateur.schemas.problems import Problem


class LocalModel(BaseModel):
    """A folder below the models root."""

    object: Literal["model"] = "model"
    source: Literal["local"] = "local"
    id: str = Field(examples=["smollm2-135m"])
    format: Literal["safetensors", "gguf"] | None = Field(description="Null if that cannot be told.")
    architecture: str | None = Field(
        description="Null if that cannot be told before the model is read.", examples=["LlamaForCausalLM"]
    )
    parameters: int | None
    bytes: int | None = Field(description="Size of the weights.")
    problem: Problem | None = Field(description="Why it cannot be pruned; null if it can.")


class PrunedModel(BaseModel):
    """The newest output of a repository name."""

    object: Literal["model"] = "model"
    source: Literal["artifact"] = "artifact"
    id: str = Field(
        description="The repository: the tenant's slug and the output's name.", examples=["default/smollm2-135m-wanda-50"]
    )
    job_id: str = Field(description="The newest job that succeeded under this name.")
    base: recipes.Model = Field(description="What was pruned.")
    method: str
    pattern: str
    sparsity: float | None = Field(
        description="As measured in the written file, or as asked if it was not measured; null for an elastic model."
    )
    bytes: int = Field(description="Size of all files.")
    created_at: datetime


class Materialization(BaseModel):
    """What to make of an elastic model: the body of `POST /v1/models/{id}/materialize`."""

    model_config = ConfigDict(extra="forbid")

    sparsity: recipes.Rate = Field(description="Fraction of zeros over the pruned linears.", examples=[0.63])
    allocation: recipes.Allocation = Field(
        default=recipes.UniformAllocation(), description="How blocks and linears share it."
    )
    output: recipes.Output = recipes.Output()


Model = Annotated[LocalModel | PrunedModel, Field(discriminator="source")]


class ModelPage(Page[Model]):
    """Local models by name, then pruned models, the newest first."""
