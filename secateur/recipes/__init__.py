"""What to do with which model: to prune it, how, how much and on which data; or to evaluate it.

A recipe is one pydantic class for each kind of job: HTTP validates it, the database stores it, the engine runs it, the
client types it and OpenAPI publishes it. Unknown fields are refused everywhere, so a misspelt parameter is an error and no
default.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from secateur.recipes.compensation import (
    Clamp,
    Compensation,
    Correction,
    EnergyCompensation,
    LeastSquares,
    MeanCorrection,
    NoCompensation,
    VarianceMatching,
)
from secateur.recipes.data import Calibration, Dataset, Evaluation, Perplexity
from secateur.recipes.elastic import MAX_RATE, Band, Curve, ElasticRecipe, Epts, Rate
from secateur.recipes.evaluate import EvaluateRecipe
from secateur.recipes.export import ExportRecipe
from secateur.recipes.induction import Initialisation, SparsityInduction
from secateur.recipes.job import DType, Integration, JobRecipe, MetadataKey, MetadataValue, ModelRecipe, Output, Schedule
from secateur.recipes.methods import ALPHAS, ALPS, RIA, DSnoT, Magnitude, Method, SparseGPT, StatisticalCorrection, Wanda
from secateur.recipes.model import Model, RepositoryName
from secateur.recipes.prune import PruneRecipe, PruneSettings
from secateur.recipes.sparsity import (
    MAX_GROUP,
    Allocation,
    AlphaPruningAllocation,
    LinearName,
    OWLAllocation,
    PerBlockAllocation,
    PerLinearAllocation,
    Ratio,
    Sparsity,
    UniformAllocation,
    known_pattern,
)

Recipe = Annotated[PruneRecipe | EvaluateRecipe | ElasticRecipe | ExportRecipe, Field(discriminator="kind")]

Kind = Literal["prune", "evaluate", "elastic", "export"]

_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Recipe)


def read_recipe(document: Any) -> Recipe:
    """The recipe of whatever kind that `document`, a JSON object, is. Raises pydantic's ValidationError."""
    return _RECIPE.validate_python(document)


def read_model_recipe(document: Any) -> ModelRecipe:
    """The recipe of a job that wrote a model. Raises TypeError if it is of another kind."""
    recipe = read_recipe(document)
    if not isinstance(recipe, ModelRecipe):
        raise TypeError(f"a job of kind {recipe.kind} writes no model")
    return recipe


__all__ = [
    "ALPHAS",
    "ALPS",
    "MAX_GROUP",
    "MAX_RATE",
    "RIA",
    "Allocation",
    "AlphaPruningAllocation",
    "Band",
    "Calibration",
    "Clamp",
    "Compensation",
    "Correction",
    "Curve",
    "DSnoT",
    "DType",
    "Dataset",
    "ElasticRecipe",
    "EnergyCompensation",
    "Epts",
    "EvaluateRecipe",
    "Evaluation",
    "ExportRecipe",
    "Initialisation",
    "Integration",
    "JobRecipe",
    "Kind",
    "LeastSquares",
    "LinearName",
    "Magnitude",
    "MeanCorrection",
    "MetadataKey",
    "MetadataValue",
    "Method",
    "Model",
    "ModelRecipe",
    "NoCompensation",
    "OWLAllocation",
    "Output",
    "PerBlockAllocation",
    "PerLinearAllocation",
    "Perplexity",
    "PruneRecipe",
    "PruneSettings",
    "Rate",
    "Ratio",
    "Recipe",
    "RepositoryName",
    "Schedule",
    "SparseGPT",
    "Sparsity",
    "SparsityInduction",
    "StatisticalCorrection",
    "UniformAllocation",
    "VarianceMatching",
    "Wanda",
    "known_pattern",
    "read_model_recipe",
    "read_recipe",
]
