"""ALPS against its algorithm written out in float64, and against SparseGPT, than which it is never worse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.pruning.allocation import Target
from secateur.pruning.methods.alps import ALPSMethod, alps, conjugate_gradients, problem_of, squared_error
from secateur.pruning.methods.factor import inverse_factor
from secateur.pruning.methods.sparsegpt import SparseGPTMethod
from secateur.recipes import ALPS, SparseGPT
from tests.engine.layers import layer, observed, output_error
from tests.targets import target

DAMPING = 0.01


def kept(scores: Tensor, goal: Target) -> Tensor:
    """True where a weight stays: the largest of the layer, or of each group. (out_features, in_features) both."""
    competing = scores.reshape(-1, goal.group[1] if goal.group else scores.numel())
    stays = torch.ones_like(competing, dtype=torch.bool)
    for row, marked in zip(competing, stays, strict=True):
        marked[row.argsort(stable=True)[: goal.count(len(row))]] = False
    return stays.view(scores.shape)


def plain_alps(weight: Tensor, inputs: Tensor, goal: Target) -> tuple[Tensor, Tensor]:
    """Algorithm 1 and the authors' schedule of rho, with a solve in each iteration, then exact least squares in each row.

    All (out_features, in_features), float64. Returns weights and what was removed.
    """
    gram = inputs.T @ inputs
    gram += DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    s = gram.diagonal().sqrt()
    h, w = gram / s / s.unsqueeze(1), weight * s
    stays = start = kept(w.abs(), goal)
    d, v, rho, moved = w * start, torch.zeros_like(w), 0.1, False
    before, size = start, int(start.sum())
    for t in range(1, 301):
        b = torch.linalg.solve(h + rho * torch.eye(len(h), dtype=h.dtype), (w @ h - v + rho * d).T).T
        stays = kept((b + v / rho).abs(), goal)
        d_next = (b + v / rho) * stays
        v, d = v + rho * (b - d_next), d_next
        if t % 3 == 0:
            changed = int((stays != before).sum())
            if (changed == 0 and moved) or (t >= 30 and changed < 3e-4 * size):
                break
            moved = moved or changed > 0.005 * size
            if not moved:
                rho, stays, d, v = rho / 5, start, w * start, torch.zeros_like(w)
            elif changed > 0.1 * size:
                rho *= 1.3
            else:
                rho *= 1.2 if changed > 0.005 * size else 1.1
            before = stays
    solved = torch.zeros_like(w)
    for row, wanted, support in zip(solved, w @ h, stays, strict=True):
        row[support] = torch.linalg.solve(h[support][:, support], wanted[support])
    return solved / s, ~stays


@pytest.mark.parametrize("amount", [0.5, 0.7, "2:4", "1:4"])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_the_papers_algorithm(amount: str | float, seed: int) -> None:
    weight, inputs = (part.double() for part in layer(rows=12, columns=32, tokens=200, seed=seed))
    goal, factor = target(amount), inverse_factor(inputs.T @ inputs, DAMPING)
    expected, removed = plain_alps(weight, inputs, goal)
    found, found_removed = alps(weight, goal, problem_of(factor), ALPS(name="alps", cg_iterations=200))
    assert torch.equal(found_removed, removed)
    assert float((found - expected).norm() / expected.norm()) < 1e-3


@pytest.mark.parametrize("amount", [0.5, 0.8, "2:4"])
def test_in_float32_it_is_as_good(amount: str | float) -> None:
    weight, inputs = layer()
    expected, _ = plain_alps(weight.double(), inputs.double(), target(amount))
    method = ALPSMethod(ALPS(name="alps"))
    (done,) = method.prune([weight], [target(amount)], method.prepare(observed("gram", inputs)))
    error = output_error(weight, done.weight, inputs)
    assert error == pytest.approx(output_error(weight, expected, inputs), rel=0.01)
    assert done.error == pytest.approx(error, rel=1e-3)
    assert bool((done.weight[done.removed] == 0).all())


def sparsegpt_error(weight: Tensor, inputs: Tensor, goal: Target) -> float:
    method = SparseGPTMethod(SparseGPT(name="sparsegpt"))
    (done,) = method.prune([weight], [goal], method.prepare(observed("gram", inputs)))
    return output_error(weight, done.weight, inputs)


@st.composite
def hard_layers(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Layers of all kinds: too few tokens, dead, equal and huge inputs, weights of zero, bfloat16."""
    columns = draw(st.sampled_from([4, 8, 24]))
    weight, inputs = layer(
        draw(st.integers(1, 9)),
        columns,
        draw(st.integers(1, 60)),
        seed=draw(st.integers(0, 10**6)),
        mean=draw(st.sampled_from([0.0, 3.0])),
    )
    inputs[:, draw(st.integers(0, columns - 1))] *= draw(st.sampled_from([0.0, 1.0, 1e3]))
    if draw(st.booleans()):
        inputs[:, 0] = inputs[:, -1]
    weight *= torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > draw(st.sampled_from([0.0, 0.4]))
    return weight.to(draw(st.sampled_from([torch.float32, torch.bfloat16]))), inputs


@given(made=hard_layers(), amount=st.sampled_from([0.1, 0.5, 0.9, "2:4", "3:4"]))
@settings(deadline=None, max_examples=150)
def test_its_error_is_never_above_that_of_sparsegpt(made: tuple[Tensor, Tensor], amount: str | float) -> None:
    weight, inputs = made
    method = ALPSMethod(ALPS(name="alps"))
    (done,) = method.prune([weight], [target(amount)], method.prepare(observed("gram", inputs)))
    assert output_error(weight, done.weight, inputs) <= sparsegpt_error(weight, inputs, target(amount)) * (1 + 1e-4) + 1e-6
    assert int(done.removed.sum()) == target(amount).count(weight.numel())


def test_it_pays_where_inputs_are_correlated() -> None:
    weight, inputs = layer(rows=64)
    method = ALPSMethod(ALPS(name="alps"))
    (done,) = method.prune([weight], [target(0.6)], method.prepare(observed("gram", inputs)))
    assert done.fallbacks == ()
    assert output_error(weight, done.weight, inputs) < 0.95 * sparsegpt_error(weight, inputs, target(0.6))


def test_where_sparsegpt_is_better_it_is_taken_and_told() -> None:
    weight, inputs = layer()
    method = ALPSMethod(ALPS(name="alps", iterations=3, cg_iterations=0))  # as good as nothing
    (done,) = method.prune([weight], [target(0.5)], method.prepare(observed("gram", inputs)))
    assert done.fallbacks == ("sparsegpt_was_better",)
    assert output_error(weight, done.weight, inputs) == pytest.approx(sparsegpt_error(weight, inputs, target(0.5)))


def test_linears_with_the_same_input_come_out_as_if_alone() -> None:
    weight, inputs = layer()
    method, group, targets = ALPSMethod(ALPS(name="alps")), [weight, weight[:7] ** 3], [target(0.5), target(0.7)]
    problem = method.prepare(observed("gram", inputs))
    for each, goal, done in zip(group, targets, method.prune(group, targets, problem), strict=True):
        (alone,) = method.prune([each], [goal], problem)
        assert torch.equal(done.weight, alone.weight)


def test_dead_inputs_are_removed_and_told() -> None:
    weight, inputs = layer()
    inputs[:, [5, 40]] = 0.0
    method = ALPSMethod(ALPS(name="alps"))
    (done,) = method.prune([weight], [target(0.5)], method.prepare(observed("gram", inputs)))
    assert done.fallbacks == ("dead_inputs:2",)
    assert bool((done.weight[:, [5, 40]] == 0).all())


def test_of_uncorrelated_inputs_the_largest_weights_stay() -> None:
    """That is the best support then; ADMM wanders off it, SparseGPT does not."""
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    method = ALPSMethod(ALPS(name="alps"))
    (done,) = method.prune([weight], [target(0.5)], method.prepare(observed("gram", torch.eye(16))))
    assert torch.equal(~done.removed, kept(weight.abs(), target(0.5)))
    assert done.fallbacks == ("sparsegpt_was_better",)


def test_each_step_of_the_gradients_lowers_the_error() -> None:
    weight, inputs = layer()
    problem = problem_of(inverse_factor(inputs.T @ inputs, DAMPING))
    scaled, removed = weight * problem.scale, ~kept(weight.abs(), target(0.5))
    goal, start = scaled @ problem.hessian, (weight * problem.scale).masked_fill(removed, 0.0)
    errors = [
        squared_error(scaled - conjugate_gradients(start, removed, goal, problem.hessian, steps), problem.hessian)
        for steps in range(8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[7] < 0.9 * errors[0]


def test_the_error_in_strips_is_that_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.pruning.methods.alps.STRIP", 7)
    weight, inputs = layer()
    expected = float((inputs.double() @ weight.double().T).square().sum())
    assert squared_error(weight, inputs.double().T @ inputs.double()) == pytest.approx(expected)
