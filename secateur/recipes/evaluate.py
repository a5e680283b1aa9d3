"""A job that evaluates a model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from secateur.recipes.data import Evaluation, Perplexity
from secateur.recipes.job import DType, JobRecipe


class EvaluateRecipe(JobRecipe):
    """Measure a model as it is: the body of `POST /v1/jobs` with `kind` `evaluate`. No model is written."""

    kind: Literal["evaluate"]
    evaluation: Evaluation = Evaluation(perplexity=Perplexity())
    dtype: DType = Field(default="bfloat16", description="What the model is computed in.")

    @field_validator("evaluation")
    @classmethod
    def _measures_something(cls, evaluation: Evaluation) -> Evaluation:
        if evaluation.perplexity is None:
            raise PydanticCustomError("evaluation_empty", "nothing is to be measured; give perplexity")
        return evaluation

    @property
    def compute_dtype(self) -> DType:
        """The one that was asked for."""
        return self.dtype
