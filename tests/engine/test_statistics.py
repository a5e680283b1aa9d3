"""Statistics of inputs that come in parts, against the same in float64 at once."""

from __future__ import annotations

import pytest
import torch

from secateur.pruning.statistics import Gram, InputMoments, observe, observer

OBSERVED = ("norms", "moments", "gram")


@pytest.mark.parametrize("observes", OBSERVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_statistic_counts_tokens_and_sums_squares(observes: str, dtype: torch.dtype) -> None:
    inputs = torch.randn(5, 700, 24, generator=torch.Generator().manual_seed(0)).to(dtype) + 1
    statistics = observer(observes, 24, torch.device("cpu"))  # type: ignore[arg-type]  # the parameters are its literals
    for part in torch.split(inputs, [1, 2, 2]):
        statistics.add(part)
    assert statistics.count == 3500
    torch.testing.assert_close(statistics.squares.double(), inputs.double().square().sum((0, 1)), rtol=1e-5, atol=0)
    if isinstance(statistics, InputMoments):
        torch.testing.assert_close(statistics.mean, inputs.double().mean((0, 1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [[3000], [1, 1, 2998], [1500, 1, 1499]], ids=str)
def test_a_variance_is_not_lost_beside_a_large_mean(parts: list[int]) -> None:
    inputs = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 2, 8) + 1000
    moments = InputMoments(8, torch.device("cpu"))
    for part in torch.split(inputs, parts):
        moments.add(part)
    expected = inputs.double().var(0, correction=0)
    torch.testing.assert_close(moments.variance, expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(moments.variance[4:], expected[4:], rtol=1e-5, atol=0)  # of 1.4 to 100 beside a mean of 1000
    torch.testing.assert_close(moments.mean, inputs.double().mean(0), rtol=1e-7, atol=0)


@pytest.mark.parametrize("counts", [[1500, 0, 1500, 5000, 3], [8003], [2048, 2048, 2048, 1859]], ids=str)
def test_a_gram_is_the_same_however_its_tokens_come(monkeypatch: pytest.MonkeyPatch, counts: list[int]) -> None:
    monkeypatch.setattr("secateur.pruning.statistics.STRIP", 7)
    inputs = torch.randn(8003, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    gram, at_once = Gram(24, torch.device("cpu")), Gram(24, torch.device("cpu"))
    observe(gram, torch.split(inputs, counts))
    at_once.add(inputs.view(1, 8003, 24))
    assert gram.count == 8003
    assert torch.equal(gram.total, at_once.total)
    exact = inputs.double().T @ inputs.double()
    torch.testing.assert_close(gram.total.double(), exact, rtol=1e-4, atol=1e-2)


def test_of_no_tokens_everything_is_zero() -> None:
    moments = InputMoments(3, torch.device("cpu"))
    moments.add(torch.empty(0, 3))
    assert (moments.count, moments.mean.tolist(), moments.variance.tolist()) == (0, [0.0] * 3, [0.0] * 3)
    gram = Gram(3, torch.device("cpu"))
    observe(gram, [])
    observe(gram, [torch.empty(0, 3)])
    assert (gram.count, gram.total.tolist()) == (0, [[0.0] * 3] * 3)
