"""Adam, with which blocks are trained."""

from __future__ import annotations

_OF_SQUARES = 0.999  # a block sees too few steps for it to matter


def betas(momentum: float) -> tuple[float, float]:
    """How much of its moments Adam keeps at a step: of gradients the `momentum`, of their squares what is usual."""
    return momentum, _OF_SQUARES
