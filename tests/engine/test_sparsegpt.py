"""SparseGPT against its equations written out in float64, column by column, and against Grams that resist."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.problems import ProblemError
from secateur.pruning.allocation import Target
from secateur.pruning.methods.factor import inverse_factor, inverted_factor
from secateur.pruning.methods.sparsegpt import SparseGPTMethod, sparsegpt
from secateur.pruning.statistics import Gram
from secateur.recipes import SparseGPT
from tests.targets import target


def plain_sparsegpt(weight: Tensor, inputs: Tensor, goal: Target, block: int, damping: float) -> tuple[Tensor, Tensor]:
    """The paper's algorithm 1 in float64: no tiles, no lazy updates, an explicit inverse. (pruned, removed)."""
    w, x = weight.double().clone(), inputs.double()
    h = x.T @ x
    dead = h.diagonal() == 0
    h.diagonal()[dead] = h.diagonal().mean()
    w[:, dead] = 0
    h += damping * (x.T @ x).diagonal().mean() * torch.eye(len(h), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    rows, columns = w.shape
    removed = torch.zeros_like(w, dtype=torch.bool)
    for j in range(columns):
        if goal.group is None and j % block == 0:
            end = min(j + block, columns)
            saliency = (w[:, j:end] ** 2 / upper.diagonal()[j:end] ** 2).flatten()
            budget = goal.count(end * rows) - goal.count(j * rows)
            chosen = saliency.argsort(stable=True)[:budget]
            part = torch.zeros(len(saliency), dtype=torch.bool)
            part[chosen] = True
            removed[:, j:end] = part.view(rows, end - j)
        if goal.group and j % goal.group[1] == 0:
            kept, group = goal.group
            saliency = w[:, j : j + group] ** 2 / upper.diagonal()[j : j + group] ** 2
            lowest = saliency.argsort(dim=1, stable=True)[:, : group - kept]
            removed[:, j : j + group] = removed[:, j : j + group].scatter(1, lowest, value=True)
        error = torch.where(removed[:, j], w[:, j], 0.0) / upper[j, j]
        w[:, j:] -= error.unsqueeze(1) * upper[j, j:].unsqueeze(0)
        w[removed[:, j], j] = 0.0
    return w, removed


@pytest.fixture
def layer() -> tuple[Tensor, Tensor]:
    """A weight, (24, 96), and correlated inputs, (400, 96), two of which are always zero."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(96, 96, generator=generator) / 10 + torch.eye(96)
    inputs = torch.randn(400, 96, generator=generator) @ mixing
    inputs[:, [5, 40]] = 0.0
    return torch.randn(24, 96, generator=generator), inputs


@pytest.mark.parametrize(
    ("amount", "block"),
    [(0.5, 128), (0.5, 32), (0.37, 20), (0.9, 7), ("2:4", 128), ("1:4", 36), ("5:6", 128), ("3:32", 128)],
)
def test_it_is_the_papers_algorithm(layer: tuple[Tensor, Tensor], amount: str | float, block: int) -> None:
    weight, inputs = layer
    goal = target(amount)
    expected, expected_removed = plain_sparsegpt(weight, inputs, goal, block, 0.01)
    gram = Gram(96, torch.device("cpu"))
    for part in torch.split(inputs, 150):
        gram.add(part)
    (done,) = sparsegpt([weight], [goal], inverse_factor(gram.total, 0.01), block)
    assert torch.equal(done.removed, expected_removed)
    assert float((done.weight.double() - expected).norm() / expected.norm()) < 1e-4
    if goal.group is None:
        assert int(done.removed.sum()) == goal.count(weight.numel())


@pytest.mark.parametrize("amounts", [(0.37, 0.6, 0.2), ("2:4", "2:4", "2:4")])
def test_linears_swept_together_come_out_as_if_alone(layer: tuple[Tensor, Tensor], amounts: tuple[str | float, ...]) -> None:
    weight, inputs = layer
    factor = inverse_factor(inputs.T @ inputs, 0.01)
    group = [weight, 3 * weight[:10] + 1, weight[5:6]]
    targets = [target(amount) for amount in amounts]
    for each, goal, done in zip(group, targets, sparsegpt(group, targets, factor, 32), strict=True):
        (alone,) = sparsegpt([each], [goal], factor, 32)
        assert torch.equal(done.removed, alone.removed)
        torch.testing.assert_close(done.weight, alone.weight)
        assert done.error == pytest.approx(alone.error)


@pytest.mark.parametrize("n", [1, 2, 7, 31, 64])
def test_the_inverse_factor_by_halves_is_that_of_lapack(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr("secateur.pruning.methods.factor.LEAF", 4)
    x = torch.randn(3 * n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    inverse = x.T @ x
    assert inverted_factor(inverse)
    torch.testing.assert_close(inverse, torch.linalg.inv(torch.linalg.cholesky(x.T @ x)))
    for place in range(n):
        broken = x.T @ x
        broken[place, place] = -1.0
        assert not inverted_factor(broken)


def test_the_update_pays(monkeypatch: pytest.MonkeyPatch, layer: tuple[Tensor, Tensor]) -> None:
    """The output error is well below that of the same mask without the update, and is what the report says."""
    monkeypatch.setattr("secateur.pruning.methods.sparsegpt.ROWS_AT_ONCE", 5)
    weight, inputs = layer
    method = SparseGPTMethod(SparseGPT(name="sparsegpt"))
    statistics = Gram(96, torch.device("cpu"))
    statistics.add(inputs)
    (done,) = method.prune([weight], [target(0.5)], method.prepare(statistics))
    outputs = weight @ inputs.T
    error = float(((weight - done.weight) @ inputs.T).square().sum() / outputs.square().sum())
    assert done.error == pytest.approx(error, rel=1e-4)
    without_update = weight.masked_fill(done.removed, 0.0)
    assert error < 0.8 * float(((weight - without_update) @ inputs.T).square().sum() / outputs.square().sum())


@pytest.mark.parametrize("rows", [1, 2])
def test_the_weight_that_is_given_stays_as_it_is(layer: tuple[Tensor, Tensor], rows: int) -> None:
    weight, inputs = layer[0][:rows].clone(), layer[1]
    before = weight.clone()
    sparsegpt([weight], [target(0.5)], inverse_factor(inputs.T @ inputs, 0.01), 128)
    assert torch.equal(weight, before)


def test_dead_inputs_are_removed_and_told(layer: tuple[Tensor, Tensor]) -> None:
    weight, inputs = layer
    factor = inverse_factor(inputs.T @ inputs, 0.01)
    (done,) = sparsegpt([weight], [target(0.5)], factor, 128)
    assert factor.fallbacks == ("dead_inputs:2",)
    assert bool((done.weight[:, [5, 40]] == 0).all())


def test_nothing_but_zeros_in_gives_zeros_out() -> None:
    factor = inverse_factor(torch.zeros(8, 8), 0.01)
    (done,) = sparsegpt([torch.randn(4, 8)], [target(0.5)], factor, 128)
    assert factor.fallbacks == ("dead_inputs:8",)
    assert bool((done.weight == 0).all())
    assert done.error == 0.0


def test_a_gram_that_float32_cannot_factor_is_factored_in_float64() -> None:
    """Inputs that come in all but equal pairs: rounding in float32 loses what makes them positive definite."""
    x = torch.randn(300, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 32:] = x[:, :32] * (1 + 1e-9)
    factor = inverse_factor((x.T @ x).float(), 1e-7)
    assert factor.fallbacks[0].startswith("cholesky_float64:damping=")
    assert bool(factor.upper.isfinite().all())


def test_a_gram_that_is_not_positive_definite_gets_more_damping() -> None:
    gram = torch.eye(16)
    gram[0, 1] = gram[1, 0] = 1.5  # eigenvalue -0.5
    factor = inverse_factor(gram, 0.01)
    assert factor.fallbacks == ("cholesky_float64:damping=1",)
    assert bool(factor.upper.isfinite().all())


def test_a_gram_beyond_help_is_a_problem() -> None:
    with pytest.raises(ProblemError) as caught:
        inverse_factor(torch.eye(4) - 1000 * torch.ones(4, 4) + torch.diag(torch.full((4,), 1000.0)), 1e-6)
    assert caught.value.code == "nonfinite_activation"
