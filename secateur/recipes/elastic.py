"""A job that makes an elastic model: one optimisation for every sparsity."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from secateur.recipes.data import Calibration, Evaluation
from secateur.recipes.job import ModelRecipe
from secateur.recipes.methods import Method
from secateur.recipes.part import Part

MAX_RATE = 0.9


Rate = Annotated[float, Field(gt=0, le=MAX_RATE)]


class Band(Part):
    """A band of sparsity rates of an elastic model: up to `upper`, from where the band below ends."""

    upper: float = Field(gt=0, le=0.95, description="The highest rate of the band.")
    rank: int = Field(ge=1, le=256, description="Rank of the pair of matrices that the band adds to those below it.")
    weight: float = Field(gt=0, le=1, description="The band's share in the inputs of the next block; all add up to 1.")


class Epts(Part):
    """Optimise an elastic model, which can be materialised at any sparsity (arXiv 2606.25285)."""

    name: Literal["epts"]
    bands: Literal["seven", "three"] | Annotated[list[Band], Field(min_length=1, max_length=16)] = Field(
        default="seven",
        description="`seven` bands of rank 8 (the authors' code), `three` of ranks 24, 16, 16 (the paper), or a list.",
    )
    epochs: float = Field(
        default=2.5, gt=0, le=100, description="Times that each block sees the calibration set (the authors' code: 10)."
    )
    sequences_per_step: int = Field(default=2, ge=1, le=64, description="Sequences that a step is made of (theirs: 1).")
    learning_rate: float = Field(
        default=1e-2, ge=0, le=1, description="Adam's for the low-rank pairs, falling to 0 as a cosine (the authors': 1e-3)."
    )
    train_base: bool = Field(
        default=True, description="Ours: train the weights themselves too; masks follow them. The paper's way is false."
    )
    base_learning_rate: float = Field(default=7e-4, ge=0, le=1, description="Adam's for the weights, with `train_base`.")
    momentum: float = Field(
        default=0.7,
        ge=0,
        lt=1,
        description="Adam's beta1, for both. With the 0.9 of the authors' many steps, the first of a few weigh on the last.",
    )
    streams: Literal["mixed", "groups"] = Field(
        default="groups",
        description="What the next block is trained on: outputs at rates of all bands, mixed (`mixed`, the paper's); or "
        "those of low, of middle and of high rates apart, each for its own bands (`groups`, ours).",
    )
    every_band: bool = Field(
        default=False,
        description="Train all bands in each step (the authors' code); otherwise one of low, of middle and of high rates.",
    )
    loss_power: float = Field(
        default=0.85,
        gt=0,
        le=1,
        description="A band's squared error is taken to this power. 1 is the authors'; below it (ours) the small errors of "
        "low rates count for more beside the large ones of high rates, at 0.5 for as much.",
    )
    self_distillation: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the lowest band's output in what the others are to give (0.5: theirs).",
    )

    @field_validator("bands")
    @classmethod
    def _in_order(cls, bands: Any) -> Any:
        if isinstance(bands, list):
            uppers = [band.upper for band in bands]
            if any(later <= earlier for earlier, later in pairwise(uppers)):
                raise PydanticCustomError("bands", "each band's upper end lies above that of the band before it")
            if abs(sum(band.weight for band in bands) - 1) > 1e-6:
                raise PydanticCustomError("bands", "the weights of the bands add up to 1")
        return bands


class Curve(Evaluation):
    """What to measure of an elastic model: perplexity at several sparsities, beside it that of other methods if named."""

    sparsities: Annotated[list[Rate], Field(min_length=1, max_length=32)] = Field(default=[0.3, 0.4, 0.5, 0.6, 0.7])
    beside: Annotated[list[Method], Field(max_length=8)] = Field(
        default=[], description="Methods that are run once for each of the sparsities, on the same calibration set."
    )


class ElasticRecipe(ModelRecipe):
    """Optimise an elastic model: the body of `POST /v1/jobs` with `kind` `elastic`."""

    kind: Literal["elastic"]
    method: Epts = Epts(name="epts")
    calibration: Calibration = Calibration()
    evaluation: Curve = Curve()

    @property
    def method_name(self) -> str:
        """The method's name."""
        return self.method.name

    @property
    def _suffix(self) -> str:
        return f"-{self.method.name}"
