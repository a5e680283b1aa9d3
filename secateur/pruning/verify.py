"""Facts about the written files: read again from the disk and held against what was asked and what came in."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from secateur.problems import ProblemError
from secateur.pruning.biases import bias_of
from secateur.pruning.checkpoint import DTYPES, FORMAT_NAMES, Checkpoint, is_cast
from secateur.pruning.families import Family
from secateur.pruning.headers import read_model
from secateur.pruning.linears import linears_of
from secateur.pruning.methods import BITS
from secateur.recipes import MeanCorrection, ModelRecipe, PruneRecipe


@dataclass(frozen=True, slots=True)
class Facts:
    """Measured in the files: zeros and weights of all pruned linears together, and zeros of each; and the embedding that the
    head is, if it has no tensor of its own."""

    zeros: int
    weights: int
    zeros_of: Mapping[str, int]
    head_tied_to: str | None

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights


def verify(
    folder: Path,
    source: Checkpoint,
    family: Family,
    removed: Mapping[str, int],
    recipe: ModelRecipe,
    *,
    folded: Collection[str] = (),
) -> Facts:
    """Check the checkpoint in `folder` against `source`.

    `removed`: the number of weights removed from each pruned linear, by its name; `folded`: tensors that scales were folded
    into. Every tensor is there with its shape and dtype; pruned ones are finite, hold at least the zeros removed from them,
    none of them negative, and obey the pattern; folded ones and biases that mean correction changes are finite; all others
    are the source's bit for bit (after the cast, if the dtype changes). Raises ProblemError `verification_failed`.
    """
    headers = read_model(folder)
    if headers.tensors.keys() != source.headers.tensors.keys():
        _fail("the file does not hold the same tensors as the source")
    if headers.config.get("tie_word_embeddings") != source.headers.config.get("tie_word_embeddings"):
        _fail("embeddings and head are no longer tied as they were")
    if any(headers.config.get(key) is not value for key, value in source.headers.switched.items()):
        _fail("config.json does not say which linears have a bias")
    dtype = DTYPES[recipe.output.dtype]
    group = recipe.sparsity.group if isinstance(recipe, PruneRecipe) else None
    linears = [linear for block in linears_of(source.headers, family) for linear in block]
    transposed = {linear.name for linear in linears if linear.transposed}
    corrects = isinstance(recipe, PruneRecipe) and isinstance(recipe.method.compensation, MeanCorrection)
    changed = {*folded, *(bias_of(linear) for linear in linears if corrects)}
    zeros_of: dict[str, int] = {}
    with Checkpoint(folder, headers) as written:
        for name, expected in source.headers.tensors.items():
            found = headers.tensors[name]
            wanted = FORMAT_NAMES[dtype] if is_cast(name, expected) else expected.dtype
            if (found.dtype, found.shape) != (wanted, expected.shape):
                _fail(f"'{name}' is {found.dtype} {found.shape}, not {wanted} {expected.shape}")
            if name in removed:
                weight = written.read(name).T if name in transposed else written.read(name)
                zeros_of[name] = _check_pruned(name, weight, removed[name], group)
            elif name in changed:
                if not bool(written.read(name).isfinite().all()):
                    _fail(f"'{name}' holds a value that is not finite")
            elif not torch.equal(_bits(written.read(name)), _bits(source.read(name, dtype))):
                _fail(f"'{name}' was not to be touched and differs from the source")
    weights = sum(headers.tensors[name].elements for name in removed)
    tied = family.embedding if family.head not in headers.tensors else None
    return Facts(sum(zeros_of.values()), weights, zeros_of, tied)


def _check_pruned(name: str, weight: Tensor, removed: int, group: tuple[int, int] | None) -> int:
    """The number of zeros in `weight`, (out_features, in_features)."""
    zero = weight == 0
    count = int(zero.sum())
    if count < removed:
        _fail(f"'{name}' has {count} zeros where {removed} weights were removed")
    if bool((torch.signbit(weight) & zero).any()):
        _fail(f"'{name}' holds a negative zero")
    if not bool(weight.isfinite().all()):
        _fail(f"'{name}' holds a value that is not finite")
    if group and int(zero.reshape(len(zero), -1, group[1]).sum(dim=2).min()) < group[1] - group[0]:
        _fail(f"'{name}' has a group of {group[1]} with fewer than {group[1] - group[0]} zeros")
    return count


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(BITS[tensor.element_size()])


def _fail(what: str) -> NoReturn:
    raise ProblemError("verification_failed", f"The written model is not what was asked for: {what}.")
