"""Where the scales begin."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.recipes import Initialisation

FLOOR = 0.01  # of the mean scale: the paper's can be zero, and a fold divides by it


def initial_scales(kind: Initialisation, inputs: Tensor) -> Tensor:
    """A scale for each input, (in_features,), float32, from some of them: `inputs`, (tokens, in_features).

    `data`: (median - mean)^2 (the paper's equation 5 with g the identity; it speaks of outputs, which for a scale of inputs
    are those of the linear or norm before). `rms`: the root of the mean square. `one`: ones.
    """
    wide = inputs.float()  # (tokens, in_features)
    if not len(wide):  # an expert that nothing was sent to
        return torch.ones(wide.shape[1], device=wide.device)
    match kind:
        case "data":
            scale = (wide.T.contiguous().median(dim=1).values - wide.mean(dim=0)).square()
        case "rms":
            scale = wide.square().mean(dim=0).sqrt()
        case "one":
            return torch.ones(wide.shape[1], device=wide.device)
    mean = scale.mean()
    return scale.clamp_min(FLOOR * mean) if float(mean) > 0 else torch.ones_like(scale)
