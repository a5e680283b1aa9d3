"""What jobs of every kind have in common."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints

from secateur.recipes.data import Evaluation
from secateur.recipes.model import Model, RepositoryName, shortened
from secateur.recipes.part import Part

DType = Literal["bfloat16", "float32"]


class Output(Part):
    """What to write, and under which name."""

    name: RepositoryName | None = Field(
        default=None, description="Repository name below the tenant's. By default made from model, method and sparsity."
    )
    dtype: DType = "bfloat16"
    formats: Annotated[list[Literal["safetensors"]], Field(min_length=1, max_length=1)] = Field(default=["safetensors"])


class Schedule(Part):
    """When a job runs, and for how long."""

    priority: int = Field(
        default=0, ge=-10, le=10, description="The highest of a queue runs first. One above 0 takes a key with `admin`."
    )
    start_deadline: int | None = Field(
        default=None, ge=1, le=31_536_000, description="Seconds from submission; not begun by then, the job expires."
    )
    max_runtime: int | None = Field(
        default=None, ge=1, le=31_536_000, description="Seconds that all attempts together may run; then the job fails."
    )


class Integration(Part):
    """Where the output is taken after success; its options stand beside `name`, as `GET /v1/integrations` says."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    name: Annotated[str, StringConstraints(min_length=1, max_length=40, pattern=r"^[a-z][a-z0-9_]*$")] = Field(
        examples=["mlflow", "hub_push"]
    )

    @property
    def options(self) -> dict[str, Any]:
        """What stands beside the name."""
        return dict(self.model_extra or {})


# Neither NUL nor half a surrogate pair: not every database can keep them.
MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00]*$")]


MetadataValue = Annotated[str, StringConstraints(max_length=512, pattern=r"^[^\x00]*$")]


class JobRecipe(Part):
    """What the recipes of all kinds have."""

    kind: str
    schema_version: Literal[1] = 1
    model: Model
    evaluation: Evaluation = Evaluation()
    schedule: Schedule = Schedule()
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] = Field(default={})

    @property
    def method_name(self) -> str | None:
        """The method's name; None for a kind without one."""
        return None

    @property
    def compute_dtype(self) -> DType:
        """What the model is computed in when it is evaluated."""
        raise NotImplementedError


class ModelRecipe(JobRecipe):
    """What the recipes of those kinds have that write a model."""

    output: Output = Output()
    integrations: Annotated[list[Integration], Field(max_length=8)] | None = Field(
        default=None, description="Where to take the output. By default where the operator says; an empty list is nowhere."
    )

    @property
    def name(self) -> str:
        """The output's repository name, below the tenant's: the one that was asked for, or model and `_suffix`."""
        return self.output.name or shortened(self.model, self._suffix)

    @property
    def compute_dtype(self) -> DType:
        """The output's."""
        return self.output.dtype

    @property
    def pattern(self) -> str:
        """That of the zeros."""
        return "unstructured"

    @property
    def _suffix(self) -> str:
        """What tells this output's name from its model's, such as `-wanda-50`."""
        raise NotImplementedError
