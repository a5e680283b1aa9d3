"""The methods of pruning, and their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError

from secateur.recipes.compensation import Compensation, Correction, NoCompensation, VarianceMatching
from secateur.recipes.induction import SparsityInduction
from secateur.recipes.part import Part

ALPHAS = (0.0, 0.25, 0.5, 1.0)  # among which `alpha: auto` chooses


class _Method(Part):
    """What every method has beside its own parameters."""

    updates_weights: ClassVar[bool] = False  # also those that it keeps
    inducible: ClassVar[bool] = False  # whether sparsity can be induced before it

    compensation: Compensation = Field(
        default=NoCompensation(), description="How to make up for what was removed, with the mask as it is."
    )
    induction: SparsityInduction | None = Field(
        default=None, description="What to do to a block before it is pruned. By default nothing."
    )

    @model_validator(mode="before")
    @classmethod
    def _compares_rows_once_induced(cls, body: object) -> object:
        """A row's scores are what the scales are learned on; across rows they would explode."""
        if isinstance(body, dict) and body.get("induction") is not None and "comparison" in cls.model_fields:
            return {"comparison": "row"} | body
        return body

    @model_validator(mode="after")
    def _can_be_induced(self) -> Self:
        if self.induction and not self.inducible:
            raise PydanticCustomError(
                "induction_unavailable",
                "sparsity can be induced before magnitude, wanda, ria, sparsegpt, statistical_correction, not {method}",
                {"method": getattr(self, "name", "this method")},
            )
        if self.induction and getattr(self, "comparison", "row") == "layer":
            raise PydanticCustomError(
                "induction_comparison",
                "scales are learned for weights that compete within a row; with induction, leave comparison out or say row",
            )
        if self.induction and getattr(self, "alpha", None) == "auto":
            raise PydanticCustomError(
                "induction_alpha", "scales are learned on the scores of one alpha; with induction, give a number"
            )
        return self

    @model_validator(mode="after")
    def _compensated_knowingly(self) -> Self:
        wanted = self.compensation
        if self.updates_weights and isinstance(wanted, Correction) and not wanted.on_updated_weights:
            raise PydanticCustomError(
                "compensation_after_update",
                "this method already updates the weights that stay; to compensate on top of that, set "
                "compensation.on_updated_weights",
            )
        return self

    @property
    def alternatives(self) -> Mapping[str, Self]:
        """The methods among which held-out sequences choose, by what tells them apart; one if there is no choice."""
        return {"": self}

    @property
    def candidates(self) -> int:
        """How many candidates held-out sequences choose from for each group of linears; one if there is no choice."""
        compared = isinstance(self.compensation, Correction) and self.compensation.guard
        return len(self.alternatives) + compared

    @property
    def guarded(self) -> bool:
        """Whether calibration sequences are held out to choose on."""
        return self.candidates > 1 or (self.induction is not None and self.induction.guard)


class Magnitude(_Method):
    """Remove the weights that are smallest in absolute value."""

    inducible: ClassVar[bool] = True

    name: Literal["magnitude"]
    comparison: Literal["row", "layer"] = Field(
        default="layer", description="Which weights compete: those of one output row, or those of the whole linear."
    )


class Wanda(_Method):
    """Remove the weights with the smallest |weight| x input norm (arXiv 2306.11695)."""

    inducible: ClassVar[bool] = True

    name: Literal["wanda"]
    comparison: Literal["row", "layer"] = Field(
        default="row", description="Which weights compete: those of one output row (the paper's), or the whole linear's."
    )


class SparseGPT(_Method):
    """Remove weights by the optimal brain surgeon's saliency and update those that stay (arXiv 2301.00774)."""

    updates_weights: ClassVar[bool] = True
    inducible: ClassVar[bool] = True

    name: Literal["sparsegpt"]
    damping: float = Field(
        default=0.01, gt=0, le=1, description="Added to the Gram's diagonal, as a fraction of its mean (the paper's 0.01)."
    )
    block_size: int = Field(
        default=128, ge=1, le=4096, description="Columns that choose their mask together (the paper's 128)."
    )


class RIA(_Method):
    """Remove the weights with the smallest share of their row and column, times a power of the input norm (ICLR 2024,
    OpenReview Tr0lPx9woF)."""

    inducible: ClassVar[bool] = True

    name: Literal["ria"]
    power: float = Field(default=0.5, ge=0, le=4, description="Of the input norm (the paper's a = 0.5).")
    comparison: Literal["row", "layer"] = Field(
        default="layer",
        description="Which weights compete: those of the whole linear (as the authors' code), or of one row.",
    )


class DSnoT(_Method):
    """Refine the mask of another method: swap removed and kept weights so that the expected output is kept (arXiv
    2310.08915)."""

    name: Literal["dsnot"]
    initial: Literal["wanda", "magnitude", "ria"] = Field(
        default="wanda", description="Whose mask is refined; weights compete within an output row."
    )
    cycles: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Swaps in a row at most. By default the authors' 50 for rows of 4096 inputs, and in proportion.",
    )
    threshold: float = Field(
        default=0.1,
        ge=0,
        description="A row is done when the sum of 2048 expected outputs is off by at most this (the authors' 0.1).",
    )
    skip: Annotated[list[Annotated[str, StringConstraints(min_length=1, max_length=64)]], Field(max_length=32)] = Field(
        default=["mlp"],
        description="Linears that keep their initial mask: with one of these in their dotted name (the authors' `mlp`).",
    )


class ALPS(_Method):
    """Find the support by ADMM and the weights on it by conjugate gradients (arXiv 2406.07831)."""

    updates_weights: ClassVar[bool] = True

    name: Literal["alps"]
    damping: float = Field(
        default=0.01, gt=0, le=1, description="Added to the Gram's diagonal, as a fraction of its mean (the authors' 0.01)."
    )
    iterations: int = Field(default=300, ge=3, le=10_000, description="Of ADMM, at most (the authors' 300).")
    cg_iterations: int = Field(default=10, ge=0, le=1000, description="Of conjugate gradients, at most (the authors' 10).")


class StatisticalCorrection(_Method):
    """Remove the weights with the lowest |weight| x input statistic x column factor, and compensate (arXiv 2602.07375).

    `secateur`: Wanda's input norm, and variance matching behind the guard. `paper`: the fourth root of the input's variance,
    and energy compensation without a guard.
    """

    inducible: ClassVar[bool] = True

    name: Literal["statistical_correction"]
    variant: Literal["secateur", "paper"] = "secateur"
    alpha: Annotated[float, Field(ge=0, le=4)] | Literal["auto"] = Field(
        default=0.25,
        description="A column whose weights have the variance v gets the factor v^(-alpha/2). `auto` chooses 0, 0.25, 0.5 "
        "or 1 for each group of linears with the same input by the block's output error on held-out sequences.",
    )
    epsilon: float = Field(default=1e-8, gt=0, lt=1, description="Added to v; relative to the columns' mean variance.")
    comparison: Literal["row", "layer"] = Field(
        default="row", description="Which weights compete: those of one output row, or those of the whole linear."
    )
    compensation: Compensation = Field(
        default=VarianceMatching(name="variance_matching"),
        description="How to make up for what was removed. By default the variant's.",
    )

    @model_validator(mode="before")
    @classmethod
    def _compensation_of_the_paper(cls, body: object) -> object:
        if isinstance(body, dict) and body.get("variant") == "paper":
            return {"compensation": {"name": "energy", "guard": False}} | body
        return body

    @property
    def alternatives(self) -> Mapping[str, Self]:
        if self.alpha != "auto":
            return {"": self}
        return {f"alpha={alpha:g}": self.model_copy(update={"alpha": alpha}) for alpha in ALPHAS}


Method = Annotated[Magnitude | Wanda | SparseGPT | RIA | DSnoT | ALPS | StatisticalCorrection, Field(discriminator="name")]
