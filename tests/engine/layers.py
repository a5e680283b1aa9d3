"""What tests of methods share: small layers with correlated inputs, and the statistics of inputs that come in parts."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.pruning.registry import Observes
from secateur.pruning.statistics import Statistics, observer


def layer(
    rows: int = 24, columns: int = 96, tokens: int = 400, *, seed: int = 0, mean: float = 0.0
) -> tuple[Tensor, Tensor]:
    """A weight, (rows, columns), and correlated inputs, (tokens, columns), around `mean`."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    shift = mean * torch.randn(columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing + shift
    return torch.randn(rows, columns, generator=generator), inputs


def observed(observes: Observes, inputs: Tensor) -> Statistics:
    """The statistic of `inputs`, (tokens, in_features), taken in by thirds."""
    statistics = observer(observes, inputs.shape[1], inputs.device)
    for part in inputs.tensor_split(3):
        statistics.add(part)
    return statistics


def output_error(weight: Tensor, pruned: Tensor, inputs: Tensor) -> float:
    """Squared output error on `inputs`, relative to the squared output; in float64."""
    outputs = inputs.double() @ weight.double().T
    return float((inputs.double() @ pruned.double().T - outputs).square().sum() / outputs.square().sum())
