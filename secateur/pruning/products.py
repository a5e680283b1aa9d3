"""Linears in bfloat16 on processors that cannot multiply it.

Where torch finds no vector instructions for bfloat16 products (on x86 without AVX512, for one) it multiplies one by one, six
times as slowly as in float32. There the same products are made in float32: a product of two bfloat16 numbers is exact in it,
the sums are float32's as they are in a bfloat16 unit, and the result is rounded to bfloat16 as that unit rounds it. So a
tensor takes as much memory, and a model gives the same up to the order of sums.
"""

from __future__ import annotations

from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

ELEMENTS_AT_ONCE = 1 << 18  # of a weight that are widened: a megabyte, which stays in a core's cache


@cache
def multiplies_bfloat16() -> bool:
    """Whether torch has vector instructions of this processor's for it."""
    mkldnn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return mkldnn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`inputs`, (…, in_features), times the transpose of `weight`, (out_features, in_features), plus `bias`: (…,
    out_features), in the dtype of the inputs."""
    if not _widened(inputs):
        return functional.linear(inputs, weight, bias)
    wide = inputs.float()
    rows = max(1, ELEMENTS_AT_ONCE // weight.shape[1])
    biases = torch.split(bias, rows) if bias is not None else [None] * -(-len(weight) // rows)
    parts = [
        functional.linear(wide, part.float(), None if added is None else added.float()).to(inputs.dtype)
        for part, added in zip(torch.split(weight, rows), biases, strict=True)
    ]
    return torch.cat(parts, dim=-1)  # (…, out_features)


def use_fast_products(model: nn.Module) -> None:
    """Let the linears of `model` compute by `linear`, where that is another way than their own."""
    if not multiplies_bfloat16():
        for module in model.modules():
            if isinstance(module, nn.Linear | Conv1D) and type(module) in (nn.Linear, Conv1D):
                module.forward = partial(_forward, module)  # type: ignore[method-assign]


def _forward(module: nn.Linear | Conv1D, inputs: Tensor) -> Tensor:
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight  # (out_features, in_features)
    return linear(inputs, weight, module.bias)


def _widened(inputs: Tensor) -> bool:
    return inputs.dtype == torch.bfloat16 and inputs.device.type == "cpu" and not multiplies_bfloat16()
