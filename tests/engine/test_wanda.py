"""Wanda over matrices of more than one part of rows."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from secateur.pruning.allocation import Target
from secateur.pruning.masks import removal_mask
from secateur.pruning.methods.by_rows import ELEMENTS_IN_CACHE
from secateur.pruning.methods.wanda import WandaMethod, wanda_scores
from secateur.recipes import Wanda


@pytest.mark.parametrize("target", [Target("", Fraction("0.37")), Target("", Fraction(1, 2), (2, 4))], ids=str)
def test_parts_of_rows_make_what_the_whole_matrices_would(target: Target) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(rows, 1000, generator=generator).bfloat16() for rows in (401, 7)]
    assert weights[0].numel() > 3 * ELEMENTS_IN_CACHE
    norms = torch.rand(1000, generator=generator, dtype=torch.float64)
    for weight, pruned in zip(weights, WandaMethod(Wanda(name="wanda")).prune(weights, [target] * 2, norms), strict=True):
        scores = wanda_scores(weight, norms)
        removed = removal_mask(scores, target, "row")
        assert torch.equal(pruned.removed, removed)
        assert torch.equal(pruned.weight, weight.masked_fill(removed, 0.0))
        squares = scores.double().square()
        assert pruned.error == pytest.approx(float(squares[removed].sum() / squares.sum()), rel=1e-5)
