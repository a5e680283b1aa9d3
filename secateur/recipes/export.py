"""A job that writes an elastic model at one sparsity."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator
from pydantic_core import PydanticCustomError

from secateur.recipes.elastic import MAX_RATE
from secateur.recipes.job import ModelRecipe
from secateur.recipes.sparsity import Sparsity


class ExportRecipe(ModelRecipe):
    """Make an ordinary model of an elastic one: the body of `POST /v1/jobs` with `kind` `export`."""

    kind: Literal["export"]
    sparsity: Sparsity

    @field_validator("sparsity")
    @classmethod
    def _within_reach(cls, sparsity: Sparsity) -> Sparsity:
        if sparsity.group or sparsity.target > MAX_RATE:
            raise PydanticCustomError(
                "sparsity", "an elastic model is materialised unstructured, at {most} at most", {"most": MAX_RATE}
            )
        return sparsity

    @property
    def method_name(self) -> str:
        """The method's name."""
        return "epts"

    @property
    def _suffix(self) -> str:
        """`-63` of a target of 0.63."""
        return f"-{100 * self.sparsity.target:.6g}".replace(".", "_")
