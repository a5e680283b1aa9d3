"""What tests of compensation share: weights with a random mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from secateur.pruning.energy import energy_compensated
from secateur.pruning.methods import Pruned
from secateur.recipes import EnergyCompensation

WIDE = (1e-6, 1e6)  # a clamp that does not clamp


def problem(seed: int = 0, out_features: int = 40, in_features: int = 30, mean: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator) + mean
    return weight, torch.rand(out_features, in_features, generator=generator) < 0.5


def of_mask(weight: Tensor, removed: Tensor) -> Pruned:
    return Pruned(weight.masked_fill(removed, 0.0), removed, 0.5, "diagonal")


def energy(weight: Tensor, removed: Tensor, **constants: Any) -> Tensor:
    """A weight after energy compensation of what is left of it."""
    wanted = EnergyCompensation(name="energy", **constants)
    return energy_compensated(weight, of_mask(weight, removed), wanted).weight
