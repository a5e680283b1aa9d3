"""The chain of low-rank pairs of a linear, and the weight that it makes at a rate (MS-HiLoRA)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Chain:
    """The pairs of all bands side by side, the lowest band's first: the update of a band is up[:, :r] @ down[:r] with r the
    sum of its rank and those of the bands below, so a band inherits from all below it.

    `up`: (out_features, ranks), `down`: (ranks, in_features).
    """

    up: Tensor
    down: Tensor


def new_chain(shape: tuple[int, int], ranks: int, generator: torch.Generator) -> Chain:
    """A chain for a weight of `shape`, (out_features, in_features), that changes nothing yet: `up` is zero, `down` uniform
    within +-1 / sqrt(in_features). float32."""
    out_features, in_features = shape
    drawn = torch.rand(ranks, in_features, generator=generator) * 2 - 1  # (ranks, in_features)
    return Chain(torch.zeros(out_features, ranks), drawn / math.sqrt(in_features))


def masked_sum(weight: Tensor, chain: Chain, width: int, kept: Tensor) -> Tensor:
    """(weight + up @ down) with the first `width` ranks of `chain`, and zeros where `kept` has them: (out_features,
    in_features), in the dtype of `weight`.

    `kept` is of integers of its size. Masks are ANDs of bits here: with a mask of floats, or booleans to choose by, they
    would take a third of training's time.
    """
    up, down = chain.up[:, :width].to(weight.dtype), chain.down[:width].to(weight.dtype)
    whole = torch.addmm(weight, up, down)  # (out_features, in_features)
    whole.view(kept.dtype).bitwise_and_(kept)
    return whole


def gradients(gradient: Tensor, chain: Chain, width: int, kept: Tensor) -> tuple[Tensor, Chain]:
    """Of a loss whose gradient by the result of `masked_sum` is `gradient`: its gradients by the weight, in the dtype of
    `gradient`, and by the first `width` ranks of the chain, in the chain's."""
    of_weight = (gradient.contiguous().view(kept.dtype) & kept).view(gradient.dtype)  # (out_features, in_features)
    up, down = chain.up[:, :width].to(gradient.dtype), chain.down[:width].to(gradient.dtype)
    return of_weight, Chain((of_weight @ down.T).to(chain.up.dtype), (up.T @ of_weight).to(chain.down.dtype))
