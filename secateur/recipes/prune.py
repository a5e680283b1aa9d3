"""A job that prunes a model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from secateur.recipes.data import Calibration
from secateur.recipes.job import ModelRecipe
from secateur.recipes.methods import Method
from secateur.recipes.sparsity import Sparsity


class PruneSettings(ModelRecipe):
    """All that says how a model is pruned but the method and its sparsity: a sweep shares it among its jobs."""

    calibration: Calibration = Calibration()
    propagate: Literal["staged", "block", "none"] = Field(
        default="staged",
        description="Which inputs a linear is pruned on: those that the linears pruned before it leave it (`staged`, one "
        "forward); those of its dense block behind pruned blocks (`block`, as the papers' code, two forwards); those of "
        "the dense model (`none`, one forward).",
    )


class PruneRecipe(PruneSettings):
    """Prune a model: the body of `POST /v1/jobs` with `kind` `prune`."""

    kind: Literal["prune"]
    method: Method
    sparsity: Sparsity

    @property
    def method_name(self) -> str:
        """The method's name."""
        return self.method.name

    @property
    def pattern(self) -> str:
        """As asked."""
        return self.sparsity.pattern

    @property
    def _suffix(self) -> str:
        """`-wanda-50` or `-wanda-2-4`: method, and percent or pattern."""
        group = self.sparsity.group
        amount = f"{group[0]}-{group[1]}" if group else f"{100 * self.sparsity.target:.4g}".replace(".", "_")
        return f"-{self.method.name}-{amount}"
