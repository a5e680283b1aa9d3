"""The spectral term: lambda exp(-alpha sum ||W S||_2) over a block's linears, its value and its gradient in closed form.

With u, v the singular vectors of the largest singular value sigma of W S, S = diag(exp(theta)), d sigma = uT d(W S) v, so
d sigma / d theta_j = sigma v_j^2: no graph is kept, and v comes from the power method, each time from where it last was.

In the paper the exponent is alpha times the sum of the norms as it is. For a block of a language model that is hundreds: the
exponential underflows, and its gradient with it. Here the sum is relative to that at S = I.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from secateur.pruning.induction.scales import Scale
from secateur.pruning.lanes import Lanes

ITERATIONS = 1  # of the power method, each time
FIRST_ITERATIONS = 6


def power_iteration(weight: Tensor, scale: Tensor, right: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The largest singular value of `weight` diag(`scale`) and its right singular vector, (in_features,), from a guess.

    `weight`: (out_features, in_features); `scale` and `right`, the guess, (in_features,): all of one dtype.
    """
    tiny = torch.finfo(right.dtype).tiny
    sigma = right.norm()
    for _ in range(iterations):
        left = weight @ (scale * right)  # (out_features,)
        right = scale * (weight.T @ (left / left.norm().clamp_min(tiny)))  # (in_features,)
        sigma = right.norm()
        right = right / sigma.clamp_min(tiny)
    return sigma, right


class SpectralTerm:
    """`strength`, which is lambda, times the exponential, over the linears that `scales` scale.

    `weights`: by linear, (out_features, in_features). The lanes share the linears.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], scales: Sequence[Scale], strength: float, alpha: float, lanes: Lanes
    ) -> None:
        self._weights = {name: weights[name].float() for scale in scales for name in scale.linears}
        self._scales, self._strength, self._alpha, self._lanes = scales, strength, alpha, lanes
        self._right = {name: torch.ones_like(weight[0]) for name, weight in self._weights.items()}
        at_one = [torch.zeros(scale.free, device=weights[scale.linears[0]].device) for scale in scales]
        self._sum_at_one = float(sum(self._norms(at_one, FIRST_ITERATIONS).values()))

    def _norms(self, thetas: Sequence[Tensor], iterations: int) -> dict[str, Tensor]:
        """The largest singular value of each scaled linear; with its vector the next iteration begins."""
        named = [
            (name, scale.spread(theta, name).exp())
            for scale, theta in zip(self._scales, thetas, strict=True)
            for name in scale.linears
        ]

        def iterated(part: tuple[str, Tensor]) -> tuple[Tensor, Tensor]:
            name, factors = part
            return power_iteration(self._weights[name], factors, self._right[name], iterations)

        found = dict(zip((name for name, _ in named), self._lanes.map(iterated, named), strict=True))
        self._right = {name: right for name, (_, right) in found.items()}
        return {name: sigma for name, (sigma, _) in found.items()}

    def gradients(self, thetas: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """The term at `thetas`, one of each scale, and its gradient by each of them, of its shape."""
        norms = self._norms(thetas, ITERATIONS)
        term = self._strength * math.exp(-self._alpha * float(sum(norms.values())) / self._sum_at_one)
        slope = -term * self._alpha / self._sum_at_one
        gradients = []
        for scale in self._scales:
            parts = [
                scale.gathered(norms[name] * self._right[name].square(), name) for name in scale.linears
            ]  # (free,) each
            gradients.append(slope * torch.stack(parts).sum(dim=0))
        return term, gradients
