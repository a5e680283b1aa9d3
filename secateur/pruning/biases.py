"""Biases for linears that have none, where the architecture's config can say that they do. Torch-free.

A model with biases of zero is the same model; mean correction then fills in those that it wants.
"""

from __future__ import annotations

from dataclasses import replace

from secateur.pruning.families import Family
from secateur.pruning.headers import ModelHeaders, Tensor
from secateur.pruning.linears import Linear, linears_of


def bias_of(linear: Linear) -> str:
    """The name of a linear's bias in the checkpoint."""
    return f"{linear.name.removesuffix('weight')}bias"


def with_biases(model: ModelHeaders, family: Family) -> ModelHeaders:
    """`model` with every bias that its family's config can switch on: those that it lacks are zeros, which no file holds."""
    biases = {
        bias_of(linear): Tensor(model.tensors[linear.name].dtype, (linear.out_features,), file="", start=0, end=0)
        for block in linears_of(model, family)
        for linear in block
        if any(linear.module in modules for _, modules in family.bias_switches)
    }
    switched = {key: True for key, _ in family.bias_switches}
    return replace(model, config={**model.config, **switched}, tensors=biases | dict(model.tensors), switched=switched)
