"""Targets of linears, as tests of methods and masks need them."""

from __future__ import annotations

from secateur.pruning.allocation import Target, uniform
from secateur.recipes import Sparsity


def target(amount: str | float) -> Target:
    """The target of a linear that is pruned to a sparsity, such as 0.5, or in a pattern, such as '2:4'."""
    sparsity = Sparsity(pattern=amount) if isinstance(amount, str) else Sparsity(target=amount)
    return uniform(sparsity, ["linear"])["linear"]
