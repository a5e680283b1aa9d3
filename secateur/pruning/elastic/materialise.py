"""From an elastic model to an ordinary one: every linear at its rate, block by block, on the CPU."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.pruning.allocation import Target, allocate, blocks_of
from secateur.pruning.checkpoint import Checkpoint, write_shard
from secateur.pruning.elastic.artifact import Elastic
from secateur.pruning.elastic.linear import ElasticLinear
from secateur.pruning.facts import BlockFacts, LinearFacts
from secateur.pruning.linears import Linear
from secateur.pruning.methods import lost_share
from secateur.pruning.outliers import percentage_above
from secateur.pruning.placed import turned
from secateur.pruning.resume import Attempt
from secateur.pruning.spectra import block_exponents
from secateur.recipes import Band, OWLAllocation, Sparsity, UniformAllocation


@dataclass(frozen=True, slots=True)
class Materialiser:
    """Writes blocks of the elastic model `elastic`, whose base is `base`. `targets`: by the names of the linears' weights;
    `scores`: of the blocks, if the allocation has any."""

    elastic: Elastic
    base: Checkpoint
    targets: Mapping[str, Target]
    scores: Sequence[float]
    dtype: torch.dtype

    def write(self, index: int, prefix: str, linears: Sequence[Linear], attempt: Attempt) -> None:
        """Write block `index`, whose tensors' names begin with `prefix`, and finish it. What is none of its `linears` stays
        as it is in the base, but for the cast."""
        began = time.monotonic()
        facts, tensors = BlockFacts(index, self.scores[index] if self.scores else None), {}
        made = self.elastic.linears(self.base, linears, index, self.dtype)
        for linear in linears:
            weight, told = materialised(made[linear.module], self.elastic.header.bands, self.targets[linear.name])
            tensors[linear.name] = turned(linear, weight)
            facts.linears.append(told)
        others = (name for name in self.base.headers.tensors if name.startswith(prefix) and name not in tensors)
        write_shard(attempt.shard(index), tensors | {name: self.base.read(name, self.dtype) for name in others})
        facts.seconds = time.monotonic() - began
        attempt.finish(facts)


def materialised(linear: ElasticLinear, bands: list[Band], target: Target) -> tuple[Tensor, LinearFacts]:
    """A linear's weight at its target, (out_features, in_features), and what was done to it."""
    began = time.monotonic()
    removed = linear.removed(target.fraction)
    weight = linear.at(bands, target.fraction, removed)
    error = lost_share(linear.importance(), removed)
    seconds = time.monotonic() - began
    told = LinearFacts(
        target.name,
        tuple(weight.shape),
        float(target.fraction),
        int(removed.count_nonzero()),
        error,
        "diagonal",
        (),
        seconds,
    )
    return weight, told


def targets_of(
    sparsity: Sparsity, elastic: Elastic, base: Checkpoint, blocks: Sequence[Sequence[Linear]]
) -> tuple[dict[str, Target], list[float]]:
    """What is asked of each linear, by the name of its weight, and the scores of the blocks, if the allocation looks at the
    model: at its base, and at the norms that are kept beside it, so that nothing has to be run.

    Raises ProblemError `allocation_impossible`.
    """
    rule = sparsity.allocation
    scores: list[float] = []
    if not isinstance(rule, UniformAllocation) and rule.looks_at != "nothing":
        for index, linears in enumerate(blocks):
            made = elastic.linears(base, linears, index, torch.float32).values()
            if isinstance(rule, OWLAllocation):
                scores.append(percentage_above([(linear.weight, linear.norms) for linear in made], rule.outlier))
            else:
                scores += block_exponents([[linear.weight for linear in made]])
    return allocate(sparsity, blocks_of(blocks), scores), scores
