"""A linear of an elastic model: its weight, the norms of its inputs, and its chain; and the weight that it has at a rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from secateur.pruning.allocation import Target
from secateur.pruning.elastic.bands import band_of, exact, widths
from secateur.pruning.elastic.chain import Chain
from secateur.pruning.lanes import Lanes
from secateur.pruning.masks import removal_mask
from secateur.pruning.methods import without
from secateur.pruning.methods.wanda import wanda_scores
from secateur.recipes import Band


@dataclass(frozen=True, slots=True)
class ElasticLinear:
    """`weight`: (out_features, in_features). `norms`: each input's L2 norm in the dense model, (in_features,), float32.

    `low_band`: whether rates of the lowest band use its pair; the safeguard may say no.
    """

    weight: Tensor
    norms: Tensor
    chain: Chain
    low_band: bool = True

    def importance(self) -> Tensor:
        """Wanda's score of each weight, (out_features, in_features), float32."""
        return wanda_scores(self.weight, self.norms)

    def removed(self, rate: Fraction) -> Tensor:
        """The mask at a rate, (out_features, in_features): exactly Wanda's at that sparsity."""
        return removal_mask(self.importance(), Target("", rate), "row")

    def width(self, bands: Sequence[Band], rate: Fraction) -> int:
        """The rank of the chain at a rate."""
        band = band_of(bands, rate)
        return 0 if band == 0 and not self.low_band else widths(bands)[band]

    def at(self, bands: Sequence[Band], rate: Fraction, removed: Tensor | None = None) -> Tensor:
        """The weight at a rate: (weight + up down) with zeros where the mask is, (out_features, in_features).

        Summed in float32 and then rounded to the dtype of `weight`. `removed`: the mask, if it is known already.
        """
        width = self.width(bands, rate)
        whole = self.weight
        if width:
            up, down = self.chain.up[:, :width].float(), self.chain.down[:width].float()
            whole = torch.addmm(self.weight.float(), up, down).to(self.weight.dtype)  # (out_features, in_features)
        return without(whole, self.removed(rate) if removed is None else removed)


Linears = Mapping[str, ElasticLinear]


def weights_at(linears: Linears, bands: Sequence[Band], rate: float, lanes: Lanes) -> dict[str, Tensor]:
    """The weights of a block's linears at a rate, by their names below the block; linears side by side."""
    made = lanes.map(lambda linear: linear.at(bands, exact(rate)), list(linears.values()))
    return dict(zip(linears, made, strict=True))
