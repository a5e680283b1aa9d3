"""RIA against its equation written out in float64, and what it makes of rows and columns of zeros."""

from __future__ import annotations

import pytest
import torch

from secateur.pruning.methods.ria import RIAMethod, relative_importance
from secateur.recipes import RIA
from tests.engine.layers import layer, observed
from tests.targets import target


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("amount", "comparison"), [(0.5, "layer"), (0.375, "row"), ("2:4", "layer")])
def test_it_is_the_papers_equation(power: float, amount: str | float, comparison: str) -> None:
    weight, inputs = layer()
    method = RIAMethod(RIA.model_validate({"name": "ria", "power": power, "comparison": comparison}))
    goal = target(amount)
    (done,) = method.prune([weight], [goal], method.prepare(observed("norms", inputs)))

    size, norms = weight.double().abs(), inputs.double().norm(dim=0)
    scores = torch.zeros_like(size)
    for i in range(len(size)):
        for j in range(size.shape[1]):
            scores[i, j] = (size[i, j] / size[:, j].sum() + size[i, j] / size[i].sum()) * norms[j] ** power
    competing = scores.view(-1, 4) if goal.group else scores if comparison == "row" else scores.view(1, -1)
    expected = torch.zeros_like(competing, dtype=torch.bool)
    for row, marked in zip(competing, expected, strict=True):
        marked[row.argsort(stable=True)[: goal.count(len(row))]] = True
    assert torch.equal(done.removed, expected.view(done.removed.shape))
    assert torch.equal(done.weight, weight.masked_fill(done.removed, 0.0))


def test_a_row_and_a_column_of_zeros_matter_to_nobody() -> None:
    weight, inputs = layer(rows=6, columns=8)
    weight[2], weight[:, 5] = 0.0, 0.0
    scores = relative_importance(weight)
    assert bool(scores.isfinite().all())
    assert scores[2].tolist() == [0.0] * 8
    assert scores[:, 5].tolist() == [0.0] * 6
    method = RIAMethod(RIA(name="ria"))
    (done,) = method.prune([weight], [target(0.5)], method.prepare(observed("norms", inputs)))
    assert bool(done.removed[2].all())
    assert bool(done.removed[:, 5].all())


def test_nothing_but_zeros_is_pruned_without_ado() -> None:
    method = RIAMethod(RIA(name="ria"))
    (done,) = method.prune([torch.zeros(4, 8)], [target(0.5)], method.prepare(observed("norms", torch.zeros(9, 8))))
    assert int(done.removed.sum()) == 16
    assert done.error == 0.0
