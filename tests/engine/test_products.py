"""Products of bfloat16 on processors that have no instructions for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.pruning import products
from secateur.pruning.products import linear, use_fast_products


@pytest.fixture(autouse=True)
def _without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(products, "ELEMENTS_AT_ONCE", 200)  # several parts, the last one smaller


def exact(inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    whole = inputs.double() @ weight.double().T
    return (whole if bias is None else whole + bias.double()).bfloat16()


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_product_is_the_exact_one_rounded(with_bias: bool) -> None:
    inputs, weight = torch.randn(2, 5, 64).bfloat16(), torch.randn(10, 64).bfloat16()
    bias = torch.randn(10).bfloat16() if with_bias else None
    result = linear(inputs, weight, bias)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result, exact(inputs, weight, bias), rtol=2**-7, atol=1e-5)


def test_linears_of_both_kinds_keep_what_they_compute_and_pass_gradients() -> None:
    both = nn.ModuleList([nn.Linear(64, 10), Conv1D(10, 64)]).bfloat16()
    inputs = torch.randn(3, 64).bfloat16()
    expected = [module(inputs) for module in both]
    use_fast_products(both)
    for module, before in zip(both, expected, strict=True):
        after = module(inputs)
        torch.testing.assert_close(after, before, rtol=2**-6, atol=1e-2)
        (gradient,) = torch.autograd.grad(after.float().sum(), module.get_parameter("weight"))
        column = gradient if isinstance(module, Conv1D) else gradient.T  # (in_features, out_features)
        torch.testing.assert_close(column[:, 0], inputs.float().sum(dim=0).bfloat16(), rtol=2**-6, atol=1e-2)


def test_other_dtypes_are_left_alone() -> None:
    inputs, weight = torch.randn(3, 64), torch.randn(10, 64)
    assert torch.equal(linear(inputs, weight), nn.functional.linear(inputs, weight))
