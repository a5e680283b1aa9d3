"""How much of each linear is removed. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from secateur.recipes import Sparsity


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked of one linear.

    `name`: its tensor's. `fraction`: of its weights that are removed, exact: a method removes floor(weights x fraction).
    `group`: (N, M) if of each M consecutive inputs of a row N are kept; the fraction is then 1 - N/M.
    """

    name: str
    fraction: Fraction
    group: tuple[int, int] | None = None

    def count(self, weights: int) -> int:
        """floor(`weights` x fraction)."""
        return int(weights * self.fraction)


def uniform(sparsity: Sparsity, names: Iterable[str]) -> dict[str, Target]:
    """The same target for each of the linears `names`; a decimal number is taken as it is written: 0.3 is 3/10."""
    group = sparsity.group
    fraction = 1 - Fraction(*group) if group else Fraction(str(sparsity.target))
    return {name: Target(name, fraction, group) for name in names}
