"""The calibration set's way through the blocks of a model that is pruned."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from secateur.pruning.block_pruner import BlockPruner
from secateur.pruning.checkpoint import Checkpoint
from secateur.pruning.families import Family
from secateur.pruning.guard import Guard, cost, held_out
from secateur.pruning.induction.inducer import Streams
from secateur.pruning.induction.training import sequences_of_a_step
from secateur.pruning.memory import give_back
from secateur.pruning.resume import Attempt
from secateur.pruning.stages import groups_of
from secateur.pruning.streaming import PROBE_TOKENS, MicroBatch, StreamedModel, forward
from secateur.recipes import Method


class Walk:
    """The calibration set on its way through the blocks. `guard_share`: what the guard of a compensation or of alternatives
    takes, as a share of a forward."""

    def __init__(self, pruner: BlockPruner, source: Checkpoint, family: Family, tokens: Tensor, method: Method) -> None:
        guarded, induced = method.guarded, method.induction is not None
        self._pruner = pruner
        self._model = StreamedModel(source, family, pruner.dtype, pruner.device)
        self._probe = self._model.enter(tokens[:1, :PROBE_TOKENS])
        groups = self._groups() if guarded else 0
        observed, guards = held_out(tokens, groups, whole=induced) if guarded else (tokens, None)
        self.guard_share = 0.0 if guards is None or induced else cost(guards, tokens, groups, method.candidates)
        step = sequences_of_a_step(method.induction, len(observed)) if method.induction else None
        learned_from = self._model.batches(observed, step=step)
        # Of what is learned, a method that updates weights refuses most: where it refuses all, it shall be what it was.
        self._apart = induced and guarded and method.updates_weights
        self.batches = self._model.batches(tokens) if self._apart else learned_from
        self._dense = [replace(batch) for batch in learned_from] if induced else []
        self._guard = Guard(self._model.enter(guards), self._model.enter(guards)) if guards is not None else None
        self._model.release()
        give_back()

    def _groups(self) -> int:
        """How many groups of linears the last block has: experts, if there are any, may begin behind the first ones."""
        last = self._model.count - 1
        with self._model.block(last) as block:
            return len(groups_of(block, last, [linear.module for linear in self._pruner.linears[last]], self._probe))

    @property
    def travellers(self) -> list[MicroBatch]:
        """All that goes through the blocks: what is observed; what scales are learned from as the dense model has it; and
        what is held out."""
        return [*self.batches, *self._dense, *([self._guard.pruned, self._guard.dense] if self._guard else [])]

    def catch_up(self, attempt: Attempt, *, dense: bool) -> None:
        """Go where the first unfinished block begins: from the saved activations on, through blocks as they were written
        or, if `dense`, as they were. Of what is held out one goes each way."""
        reached, hidden = attempt.restore([batch.hidden for batch in self.travellers])
        for batch, part in zip(self.travellers, hidden, strict=True):
            batch.hidden = part
        observed = [(self.batches, dense), *([(self._dense, True)] if self._dense else [])]
        held = [([self._guard.pruned], False), ([self._guard.dense], True)] if self._guard else []
        for index in range(reached, len(attempt.finished)):
            with attempt.written(index) as written:
                for batches, as_it_was in observed + held:
                    with self._model.block(index, None if as_it_was else written) as block:
                        forward(block, index, batches, self._model.lanes)

    def _learned_from(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        """Of `batches`, which are observed, those sequences that scales are learned from, in step with the dense ones."""
        if not self._apart:
            return batches
        sizes = [len(batch.tokens) for batch in self._dense]
        hidden = torch.cat([batch.hidden for batch in batches])[: sum(sizes)]  # (sequences, seq, hidden)
        return [replace(batch, hidden=part) for batch, part in zip(self._dense, torch.split(hidden, sizes), strict=True)]

    def prune(self, index: int, *, propagate: bool) -> None:
        """Prune a block and, with `propagate`, go on behind it. If memory runs out, halve the micro-batches and begin the
        block again."""

        behind: list[MicroBatch] = []

        def work(batches: list[MicroBatch]) -> None:
            behind[:] = [replace(batch) for batch in self._dense]
            with self._model.block(index) as block:
                learned_from = Streams(self._learned_from(batches), behind) if behind else None
                self._pruner.prune_observing(
                    block, batches, self._probe, self._guard, learned_from=learned_from, propagate=propagate
                )

        def again(size: int) -> None:
            self._pruner.begin(index, fallbacks=(*self._pruner.facts.fallbacks, f"out_of_memory:micro_batch={size}"))
            self._dense = self._model.halved(self._dense) if self._dense else []

        self.batches = self._model.within_memory(self.batches, work, again)
        self._dense = behind
