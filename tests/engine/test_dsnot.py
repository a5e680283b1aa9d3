"""DSnoT against its algorithm written out in float64, one row and one swap at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.pruning.allocation import Target
from secateur.pruning.methods.dsnot import TOKENS_OF_THRESHOLD, DSnoTMethod, default_cycles
from secateur.recipes import DSnoT
from tests.engine.layers import layer, observed
from tests.targets import target


def plain_row(weight: Tensor, removed: Tensor, inputs: Tensor, group: int | None, parameters: DSnoT) -> Tensor:
    """One row, (in_features,), float64: the mask after the swaps."""
    mean, variance, norm = inputs.mean(dim=0), inputs.var(dim=0, correction=0), inputs.norm(dim=0)
    part, columns = (weight * mean).tolist(), range(len(weight))
    wanda = (weight.abs() * norm).tolist()
    error = sum(part[j] for j in columns if removed[j])
    sign = error > 0
    out, kept, now = [j for j in columns if removed[j]], [j for j in columns if not removed[j]], removed.clone()
    for _ in range(parameters.cycles or default_cycles(len(weight))):
        if abs(error) * TOKENS_OF_THRESHOLD <= parameters.threshold:
            break
        side = 1 if error > 0 else -1
        candidates = [j for j in out if side * part[j] > 0]
        if not candidates:
            break
        come = max(candidates, key=lambda j: side * part[j] / float(variance[j]))
        going = [j for j in kept if (j // group == come // group if group else side * part[j] < 0)]
        if not going:
            break
        go = min(going, key=lambda j: wanda[j])
        after = error + part[go] - part[come]
        if group and (after > 0) != sign:
            break
        now[come], now[go], error = False, True, after
        out.remove(come)
        kept.remove(go)
    return now


def initial_of(method: str, weight: Tensor, inputs: Tensor, goal: Target) -> Tensor:
    scores = weight.abs() * (inputs.norm(dim=0) if method == "wanda" else 1.0)
    size = goal.group[1] if goal.group else weight.shape[1]
    removed = torch.zeros_like(weight, dtype=torch.bool).view(-1, size)  # (rows * groups, size)
    for row, marked in zip(scores.view(-1, size), removed, strict=True):
        marked[row.argsort(stable=True)[: goal.count(size)]] = True
    return removed.view(weight.shape)


@pytest.mark.parametrize("initial", ["wanda", "magnitude"])
@pytest.mark.parametrize("amount", [0.5, 0.75, "2:4", "1:4"])
@pytest.mark.parametrize(
    "settings",
    [{"cycles": 50}, {"cycles": 3}, {"cycles": 50, "threshold": 40.0}, {"cycles": 500, "threshold": 0.0}],
    ids=str,
)
def test_it_is_the_papers_algorithm(initial: str, amount: str | float, settings: dict[str, Any]) -> None:
    weight, inputs = layer(mean=0.3)
    parameters = DSnoT.model_validate({"name": "dsnot", "initial": initial, "skip": []} | settings)
    method, goal = DSnoTMethod(parameters), target(amount)
    (done,) = method.prune([weight], [goal], method.prepare(observed("moments", inputs)))

    wide, seen, group = weight.double(), inputs.double(), goal.group[1] if goal.group else None
    before = initial_of(initial, wide, seen, goal)
    rows = zip(wide, before, strict=True)
    expected = [plain_row(w, gone, seen, group, parameters) for w, gone in rows]
    assert torch.equal(done.removed, torch.stack(expected))
    assert not torch.equal(done.removed, before)
    assert torch.equal(done.removed.sum(dim=1), before.sum(dim=1))
    assert torch.equal(done.weight, weight.masked_fill(done.removed, 0.0))


def test_the_expected_output_is_kept_better() -> None:
    weight, inputs = layer(columns=512, tokens=600, mean=0.3)
    off = []
    for skip in (["linear"], []):
        method = DSnoTMethod(DSnoT(name="dsnot", skip=skip))
        (done,) = method.prune([weight], [target(0.5)], method.prepare(observed("moments", inputs)))
        off.append(float(((weight - done.weight) @ inputs.mean(dim=0)).abs().mean()))
    assert off[1] < 0.5 * off[0]


@pytest.mark.parametrize(("width", "cycles"), [(4096, 50), (11008, 134), (576, 7), (8, 1)])
def test_swaps_are_in_proportion_to_a_rows_width(width: int, cycles: int) -> None:
    assert default_cycles(width) == cycles


def test_a_linear_that_is_skipped_keeps_its_initial_mask() -> None:
    weight, inputs = layer(mean=0.3)
    method = DSnoTMethod(DSnoT(name="dsnot"))
    goal = target(0.5)
    targets = [Target(f"model.layers.0.{name}.weight", goal.fraction) for name in ("self_attn.q_proj", "mlp.up_proj")]
    refined, skipped = method.prune([weight, weight], targets, method.prepare(observed("moments", inputs)))
    initial = initial_of("wanda", weight.double(), inputs.double(), goal)
    assert torch.equal(skipped.removed, initial)
    assert not torch.equal(refined.removed, initial)


def test_inputs_that_never_change_or_are_always_zero_are_no_trouble() -> None:
    weight, inputs = layer(rows=6, columns=16, mean=1.0)
    inputs[:, 3], inputs[:, 7] = 0.0, 2.5
    method = DSnoTMethod(DSnoT(name="dsnot", skip=[]))
    (done,) = method.prune([weight], [target(0.5)], method.prepare(observed("moments", inputs)))
    assert done.removed.sum(dim=1).tolist() == [8] * 6
    assert bool(done.removed[:, 3].all())  # nothing is gained by letting such a weight come back
