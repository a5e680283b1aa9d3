"""Statistics of inputs that come in parts, against the same in float64 at once."""

from __future__ import annotations

import pytest
import torch

from secateur.pruning.statistics import InputMoments, observer

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


def test_of_no_tokens_everything_is_zero() -> None:
    moments = InputMoments(3, torch.device("cpu"))
    moments.add(torch.empty(0, 3))
    assert (moments.count, moments.mean.tolist(), moments.variance.tolist()) == (0, [0.0] * 3, [0.0] * 3)
