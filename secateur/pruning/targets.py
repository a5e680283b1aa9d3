"""The target of every linear of a checkpoint: what its allocation says, which may look at the model first."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.pruning.allocation import Target, allocate, blocks_of
from secateur.pruning.checkpoint import DTYPES, Checkpoint
from secateur.pruning.families import Family
from secateur.pruning.linears import linears_of
from secateur.pruning.outliers import outlier_percentages
from secateur.pruning.resume import Attempt
from secateur.pruning.spectra import block_exponents
from secateur.pruning.streaming import StreamedModel
from secateur.recipes import AlphaPruningAllocation, OWLAllocation, PruneRecipe


def targets_of(
    recipe: PruneRecipe, source: Checkpoint, family: Family, *, tokens: Tensor | None, attempt: Attempt, device: torch.device
) -> tuple[dict[str, Target], list[float]]:
    """Every linear's target, by its tensor's name, and the scores of the blocks that they were made from, if any were.

    What an allocation saw in the dense model is kept in the attempt's folder. `tokens`: the calibration set, (samples,
    sequence_length), for an allocation that looks at inputs.
    """
    rule, linears = recipe.sparsity.allocation, linears_of(source.headers, family)
    blocks = blocks_of(linears)

    def look() -> list[float]:
        match rule:
            case OWLAllocation():
                assert tokens is not None, "an allocation that looks at inputs has a calibration set"  # noqa: S101 - for the type checker
                model = StreamedModel(source, family, DTYPES[recipe.output.dtype], device)
                return outlier_percentages(model, linears, tokens, rule.outlier)
            case AlphaPruningAllocation():
                return block_exponents((source.read(name, torch.float32, device) for name in block) for block in blocks)
            case _:
                return []

    scores = [] if rule.looks_at == "nothing" else attempt.scores(look)
    return allocate(recipe.sparsity, blocks, scores), scores
