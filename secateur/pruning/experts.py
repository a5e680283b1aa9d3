"""Mixture-of-experts layers whose experts are linears of their own, where transformers runs them from two fused tensors.

A fused module holds the weights of all experts in two tensors of three axes. What stands in for it computes the same with a
linear for each expert's gate, up and down: each can be observed, paused at and pruned like any other, and bears the name
that its weight has in checkpoints.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from secateur.problems import ProblemError
from secateur.pruning.linears import FUSED
from secateur.pruning.registry import Observes

# Below so many tokens an expert's inputs say little of it. A rule of ours, not measured: for norms a handful of tokens is
# enough; a Gram matrix of fewer tokens than this part of its rows is nearly all damping.
FEWEST_TOKENS = 32
GRAM_SHARE = 8


class Experts(nn.ModuleList):
    """Stands in for a fused experts module, and is called as it is."""

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of each token's experts, (tokens, hidden).

        `hidden`: (tokens, hidden); `chosen`: the experts of each token, (tokens, experts per token); `weights`: their
        shares, the same shape. Every expert is called, also one that no token chose, so that every linear runs in every
        micro-batch.
        """
        result = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            token, place = torch.where(chosen == number)  # (tokens of this expert,) each
            output = expert(hidden[token]) * weights[token, place, None]  # (tokens of this expert, hidden)
            result.index_add_(0, token, output.to(result.dtype))
        return result


class _Expert(nn.Module):
    def __init__(self, hidden: int, middle: int, activation: nn.Module, like: Tensor) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, middle, bias=False, device=like.device, dtype=like.dtype)
        self.up_proj = nn.Linear(hidden, middle, bias=False, device=like.device, dtype=like.dtype)
        self.down_proj = nn.Linear(middle, hidden, bias=False, device=like.device, dtype=like.dtype)
        self.activation = activation

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.down_proj(self.activation(self.gate_proj(hidden)) * self.up_proj(hidden))
        return output


def fewest_tokens(in_features: int, observes: Observes) -> int:
    """The tokens that an expert must have seen to be pruned by what it saw, and not by its weights alone."""
    return max(FEWEST_TOKENS, in_features // GRAM_SHARE) if observes == "gram" else FEWEST_TOKENS


def separate_experts(model: nn.Module) -> None:
    """Replace every fused experts module of `model`, which has no weights yet.

    Raises ProblemError `unsupported_architecture` for one that is not down(activation(gate(x)) * up(x)) without biases.
    """
    for name, module in list(model.named_modules()):
        parameters = dict(module.named_parameters(recurse=False))
        if not any(parameter.dim() == 3 and key in FUSED for key, parameter in parameters.items()):
            continue
        if parameters.keys() != FUSED or not _is_plain(module):
            raise ProblemError(
                "unsupported_architecture", f"The experts of this architecture ({type(module).__name__}) are not supported."
            )
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent).register_module(leaf, _separated(module, parameters["down_proj"]))


def _is_plain(module: nn.Module) -> bool:
    flags = {
        "has_gate": True,
        "has_bias": False,
        "is_transposed": False,
        "is_concatenated": True,
        "has_post_expert_norm": False,
    }
    gating = getattr(type(module), "_apply_gate", None)
    return gating is moe._default_apply_gate and all(getattr(module, flag, None) is value for flag, value in flags.items())


def _separated(module: nn.Module, down: Tensor) -> Experts:
    count, hidden, middle = down.shape
    activation = module.get_submodule("act_fn")
    return Experts(_Expert(hidden, middle, activation, down) for _ in range(count))
