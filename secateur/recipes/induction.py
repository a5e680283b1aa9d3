"""What makes a model easier to prune, before any criterion."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from secateur.recipes.part import Part

Initialisation = Literal["data", "rms", "one"]


class SparsityInduction(Part):
    """Before a block is pruned, learn a scale for each input by which its weights count (arXiv 2602.21652). What weighs
    inputs itself gets the scale as a factor of its scores; Magnitude gets it folded into the weights, which keeps the
    model's function. The model has no more parameters afterwards than before."""

    name: Literal["sparsity_induction"]
    epochs: int = Field(
        default=1, ge=0, le=5, description="Times that each block sees the calibration set (the paper's 1 to 5). 0: none."
    )
    initialisation: Initialisation | None = Field(
        default=None,
        description="Where scales begin: `data`, (median - mean)^2 of each input (the paper's equation 5, floored); `rms`, "
        "its root mean square; `one`. By default `rms` before Magnitude and `one` before other methods.",
    )
    sequences_per_step: int = Field(
        default=8,
        ge=1,
        le=64,
        description="Sequences that a step is made of; fewer where an epoch had less than four steps (ours).",
    )
    learning_rate: float = Field(default=0.06, gt=0, le=1, description="Adam's, of the scales' logarithms (ours).")
    momentum: float = Field(
        default=0.7, ge=0, lt=1, description="Adam's beta1: of a few steps, the first are forgotten (ours)."
    )
    refresh_every: int = Field(
        default=1, ge=1, le=1000, description="Steps after which masks are made anew of the scales as they are (ours)."
    )
    temperature: tuple[Annotated[float, Field(gt=0, le=10)], Annotated[float, Field(gt=0, le=10)]] = Field(
        default=(0.1, 0.05),
        description="Width of the sigmoid that stands for the mask in the gradient, in units of a score's logarithm: at "
        "first and at last (ours).",
    )
    spectral_weight: float = Field(
        default=0.01,
        ge=0,
        le=100,
        description="Of the term of spectral norms: lambda, which the paper does not say. 0: none.",
    )
    spectral_alpha: float = Field(
        default=1.0, gt=0, le=100, description="Its exponent, for norms relative to what they are at scales of one (ours)."
    )
    guard: bool = Field(
        default=True,
        description="Leave a block's scales at one where they do not lower its output error on held-out calibration "
        "sequences. Takes two samples or more.",
    )
