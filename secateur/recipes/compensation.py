"""What is done to the weights that stay, behind any criterion."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from secateur.recipes.part import Part

Clamp = tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(ge=1)]]


class NoCompensation(Part):
    """Leave the weights that stay as the method leaves them."""

    name: Literal["none"] = "none"


class Correction(Part):
    guard: bool = Field(
        default=True,
        description="Compare the block's output error with and without it on held-out calibration sequences, for each group "
        "of linears with the same input, and refuse it where it does not lower the error. Takes two samples or more.",
    )
    on_updated_weights: bool = Field(
        default=False, description="Say that it is wanted after a method that has updated the weights itself."
    )


class EnergyCompensation(Correction):
    """Give columns, then rows, the spread they had before (arXiv 2602.07375). Looks at no data but the guard's."""

    name: Literal["energy"]
    epsilon: float = Field(default=1e-8, ge=0, lt=1, description="Keeps the quotient finite; relative to the energy before.")
    clamp: Clamp = Field(default=(0.8, 1.5), description="Least and largest factor.")


class VarianceMatching(Correction):
    """Scale each row so that its output has the second moment that it had before."""

    name: Literal["variance_matching"]
    tokens: float = Field(
        default=1 / 32, gt=0, le=0.125, description="Share of the calibration tokens that moments are from."
    )
    clamp: Clamp = Field(default=(0.5, 2.0), description="Least and largest factor.")


class LeastSquares(Correction):
    """Scale each row so that its output has the least squared error."""

    name: Literal["least_squares"]
    tokens: float = Field(
        default=1 / 32, gt=0, le=0.125, description="Share of the calibration tokens that moments are from."
    )
    clamp: Clamp = Field(default=(0.5, 2.0), description="Least and largest factor.")


class MeanCorrection(Correction):
    """Add to each bias what the mean output lost. Linears get a bias where the architecture's config can say so (Llama's
    `attention_bias` and `mlp_bias`, for example); the config of the output says it."""

    name: Literal["mean_correction"]


Compensation = Annotated[
    NoCompensation | EnergyCompensation | VarianceMatching | LeastSquares | MeanCorrection, Field(discriminator="name")
]
