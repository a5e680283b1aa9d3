"""The block loop: load a block, run the calibration set through it, prune its linears, write it."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from secateur.pruning.block_pruner import BlockPruner
from secateur.pruning.checkpoint import Checkpoint, write_shard
from secateur.pruning.device import best_device
from secateur.pruning.events import Narrator
from secateur.pruning.families import Family
from secateur.pruning.guard import MOST_SHARE
from secateur.pruning.linears import unused_tensors
from secateur.pruning.memory import give_back, keep_what_is_freed
from secateur.pruning.resume import Attempt
from secateur.pruning.targets import targets_of
from secateur.pruning.walk import Walk
from secateur.recipes import PruneRecipe


def prune_blocks(
    recipe: PruneRecipe, source: Checkpoint, family: Family, *, tokens: Tensor | None, attempt: Attempt, narrator: Narrator
) -> float:
    """Prune the blocks of `source` that `attempt` has not finished, and finish them.

    `tokens`: the calibration set, (samples, sequence_length), for a method or an allocation that observes inputs; else None.
    Returns the seconds from the first block's load to the last block's shard, with those that the allocation took to look at
    the model and those that earlier attempts spent on the blocks taken over. Raises ProblemError `nonfinite_activation`,
    naming the block.
    """
    began, device = time.monotonic(), best_device()
    targets, scores = targets_of(recipe, source, family, tokens=tokens, attempt=attempt, device=device)
    allocating = time.monotonic() - began
    pruner = BlockPruner(recipe, source, family, targets, device)
    total, first = len(pruner.linears), len(attempt.finished)
    spent = sum(facts.seconds for facts in attempt.finished)
    narrator.progress(first, total)
    walk = (
        Walk(pruner, source, family, tokens, recipe.method)
        if tokens is not None and pruner.observing and first < total
        else None
    )
    if walk and walk.guard_share > MOST_SHARE:
        narrator.log(
            f"The guard takes {walk.guard_share:.0%} of a forward of the calibration set: it tries "
            f"{recipe.method.candidates} candidates for each group of linears, on as few tokens as say anything.",
            "warning",
        )
    keep_what_is_freed(training=recipe.method.induction is not None)
    began = time.monotonic()
    if walk:
        walk.catch_up(attempt, dense=recipe.propagate == "none")
    for index in range(first, total):
        started = time.monotonic()
        pruner.begin(index)
        if walk:
            walk.prune(index, propagate=index + 1 < total)
        else:
            pruner.prune_unobserved()
        pruner.write(attempt)
        pruner.facts.seconds = time.monotonic() - started
        pruner.facts.score = scores[index] if scores else None
        attempt.finish(pruner.facts)
        if walk and index + 1 < total:
            attempt.save(index + 1, [batch.hidden for batch in walk.travellers])
        narrator.progress(index + 1, total)
    seconds = spent + allocating + time.monotonic() - began
    keep_what_is_freed()
    give_back()  # what comes next reads files, which count as memory meanwhile
    return seconds


def write_outside_blocks(source: Checkpoint, family: Family, dtype: torch.dtype, attempt: Attempt) -> None:
    """Write embeddings, head, final norm and whatever else is not in a block, untouched but for the cast to `dtype`."""
    prefix, unused = f"{family.blocks}.", set(unused_tensors(source.headers, family))
    names = [name for name in source.headers.tensors if name in unused or not name.startswith(prefix)]
    write_shard(attempt.outside, {name: source.read(name, dtype) for name in names})
