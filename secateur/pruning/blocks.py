"""The block loop: load a block, run the calibration set through it, prune its linears, write it."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from secateur.problems import ProblemError
from secateur.pruning.allocation import uniform
from secateur.pruning.checkpoint import DTYPES, Checkpoint, write_shard
from secateur.pruning.events import Narrator
from secateur.pruning.explain import is_out_of_memory
from secateur.pruning.facts import BlockFacts, LinearFacts
from secateur.pruning.families import Family, block_count, pruned_weights
from secateur.pruning.lanes import lanes
from secateur.pruning.memory import give_back
from secateur.pruning.methods import Method
from secateur.pruning.registry import METHODS
from secateur.pruning.resume import Attempt
from secateur.pruning.stages import Group, groups_of, run_dense, run_staged
from secateur.pruning.statistics import Statistics, observe, observer
from secateur.pruning.streaming import MicroBatch, StreamedModel, forward
from secateur.recipes import PruneRecipe

PROBE_TOKENS = 8


def prune_blocks(
    recipe: PruneRecipe, source: Checkpoint, family: Family, *, tokens: Tensor | None, attempt: Attempt, narrator: Narrator
) -> float:
    """Prune the blocks of `source` that `attempt` has not finished, and finish them.

    `tokens`: the calibration set, (samples, sequence_length), for a method that observes its inputs; None for another.
    Returns the seconds from the first block's load to the last block's shard, with those that earlier attempts spent on the
    blocks taken over. Raises ProblemError `nonfinite_activation`, naming the block.
    """
    pruner = _BlockPruner(recipe, source, family, best_device())
    total, first = block_count(source.headers), len(attempt.finished)
    spent = sum(facts.seconds for facts in attempt.finished)
    narrator.progress(first, total)
    walk = _Walk(pruner, source, family, tokens) if tokens is not None and first < total else None
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
        attempt.finish(pruner.facts)
        if walk and index + 1 < total:
            attempt.save(index + 1, [batch.hidden for batch in walk.batches])
        narrator.progress(index + 1, total)
    return spent + time.monotonic() - began


def best_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _BlockPruner:
    """One block at a time: `begin`, then one of the ways to prune it, `write`; what was done is in `facts`."""

    def __init__(self, recipe: PruneRecipe, source: Checkpoint, family: Family, device: torch.device) -> None:
        card = METHODS[recipe.method.name]
        self._method: Method = card.load()(recipe.method)
        self._targets = uniform(recipe.sparsity, pruned_weights(source.headers, family))
        self._observes, self._propagate = card.observes, recipe.propagate
        self._source, self._family = source, family
        self.dtype, self.device, self._lanes = DTYPES[recipe.output.dtype], device, lanes(device)
        self.begin(0)

    def begin(self, index: int, *, fallbacks: tuple[str, ...] = ()) -> None:
        self.facts = BlockFacts(index, fallbacks=fallbacks)
        self._pruned: dict[str, Tensor] = {}

    def prune_unobserved(self) -> None:
        for name in self._family.weights(self.facts.block):
            self._prune([name], [self._source.read(name, self.dtype, self.device)], None)

    def prune_observing(self, block: nn.Module, batches: list[MicroBatch], probe: MicroBatch, *, propagate: bool) -> None:
        """Prune `block` on `batches`; with `propagate` they carry its output afterwards, as the recipe says which."""
        groups = groups_of(block, self.facts.block, self._family.linears, probe)
        if self._propagate == "staged":
            self._prune_staged(block, batches, groups, propagate=propagate)
        else:
            self._prune_whole(block, batches, groups, propagate=propagate)
        if propagate and not all(_finite(batch.hidden) for batch in batches):
            raise self._nonfinite("its output")

    def _prune_staged(self, block: nn.Module, batches: list[MicroBatch], groups: list[Group], *, propagate: bool) -> None:
        def prune(group: Group, inputs: list[Tensor]) -> None:
            self._prune_group(block, group, self._observed(block, group, inputs))

        run_staged(block, self.facts.block, batches, groups, prune=prune, lanes=self._lanes, propagate=propagate)

    def _prune_whole(self, block: nn.Module, batches: list[MicroBatch], groups: list[Group], *, propagate: bool) -> None:
        """Observe all of the dense block, then prune it; what goes on is its dense output, or that of a second forward."""
        index, dense = self.facts.block, self._propagate == "none"
        seen = {group: self._observed(block, group, []) for group in groups}

        def see(group: Group, inputs: list[Tensor]) -> None:
            observe(seen[group], inputs, self._lanes)

        run_dense(block, index, batches, groups, observe=see, lanes=self._lanes, propagate=dense and propagate)
        for group in groups:
            self._prune_group(block, group, seen.pop(group))
        if propagate and not dense:
            forward(block, index, batches, self._lanes)

    def _observed(self, block: nn.Module, group: Group, inputs: list[Tensor]) -> Statistics:
        statistics = observer(self._observes, _linear(block, group[0]).in_features, self.device)
        observe(statistics, inputs, self._lanes)
        return statistics

    def _prune_group(self, block: nn.Module, group: Group, statistics: Statistics) -> None:
        """Prune the linears of `group` in `block`, in place."""
        linears = [_linear(block, name) for name in group]
        names = [f"{self._family.block(self.facts.block)}.{name}.weight" for name in group]
        if not bool(statistics.squares.isfinite().all()):
            raise self._nonfinite(f"the input of '{names[0]}'")
        pruned = self._prune(names, [linear.weight for linear in linears], self._method.prepare(statistics))
        for linear, weight in zip(linears, pruned, strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)

    def _prune(self, names: list[str], weights: list[Tensor], prepared: Any) -> list[Tensor]:
        started = time.monotonic()
        targets = [self._targets[name] for name in names]
        done = self._method.prune(weights, targets, prepared)
        seconds, rows = time.monotonic() - started, sum(len(weight) for weight in weights)
        for name, target, each in zip(names, targets, done, strict=True):
            self._pruned[name] = each.weight
            self.facts.linears.append(
                LinearFacts(
                    name=name,
                    shape=tuple(each.weight.shape),
                    target=float(target.fraction),
                    removed=int(each.removed.count_nonzero()),
                    error=each.error,
                    error_measure=each.error_measure,
                    fallbacks=each.fallbacks,
                    seconds=seconds * len(each.weight) / rows,
                )
            )
        return [each.weight for each in done]

    def write(self, attempt: Attempt) -> None:
        """Every tensor of the block: the pruned ones, and the others as they came, cast."""
        prefix = f"{self._family.block(self.facts.block)}."
        names = [name for name in self._source.headers.tensors if name.startswith(prefix)]
        tensors = {
            name: self._pruned[name] if name in self._pruned else self._source.read(name, self.dtype) for name in names
        }
        write_shard(attempt.shard(self.facts.block), tensors)

    def _nonfinite(self, where: str) -> ProblemError:
        return ProblemError(
            "nonfinite_activation",
            f"In block {self.facts.block}, {where} is not finite on the calibration text.",
            hint="The weights may hold NaN or infinity, or the model may overflow in this dtype: try float32.",
        )


class _Walk:
    """The calibration set on its way through the blocks."""

    def __init__(self, pruner: _BlockPruner, source: Checkpoint, family: Family, tokens: Tensor) -> None:
        self._pruner = pruner
        self._model = StreamedModel(source, family, pruner.dtype, pruner.device)
        self.batches = self._model.batches(tokens)
        self._probe = self._model.enter(tokens[:1, :PROBE_TOKENS])
        self._model.release()
        give_back()

    def catch_up(self, attempt: Attempt, *, dense: bool) -> None:
        """Go where the first unfinished block begins: from the saved activations on, through blocks as they were written
        or, if `dense`, as they were."""
        reached, hidden = attempt.restore([batch.hidden for batch in self.batches])
        for batch, part in zip(self.batches, hidden, strict=True):
            batch.hidden = part
        for index in range(reached, len(attempt.finished)):
            with attempt.written(index) as written, self._model.block(index, None if dense else written) as block:
                forward(block, index, self.batches, self._model.lanes)

    def prune(self, index: int, *, propagate: bool) -> None:
        """Prune a block and, with `propagate`, go on behind it. If memory runs out, halve the micro-batches and begin the
        block again."""
        while not self._pruned(index, propagate=propagate):
            size = max(batch.tokens.numel() for batch in self.batches)
            self.batches = self._model.halved(self.batches)
            self._model.release()
            self._pruner.begin(index, fallbacks=(*self._pruner.facts.fallbacks, f"out_of_memory:micro_batch={size}"))

    def _pruned(self, index: int, *, propagate: bool) -> bool:
        """Whether the memory sufficed; when it did not, nothing that was made of the block is still held."""
        try:
            with self._model.block(index) as block:
                self._pruner.prune_observing(block, self.batches, self._probe, propagate=propagate)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or all(len(batch.tokens) == 1 for batch in self.batches):
                raise
            return False
        return True


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise ProblemError("unsupported_architecture", f"'{name}' is a {type(module).__name__}, where a linear is needed.")
    return module


def _finite(hidden: Tensor) -> bool:
    """Whether all is finite. A sum, forty times as fast on a CPU, is finite only then; but it may also overflow."""
    return bool(hidden.sum().isfinite()) or bool(hidden.isfinite().all())


def write_outside_blocks(source: Checkpoint, family: Family, dtype: torch.dtype, attempt: Attempt) -> None:
    """Write embeddings, head, final norm and whatever else is not in a block, untouched but for the cast to `dtype`."""
    prefix = f"{family.blocks}."
    names = [name for name in source.headers.tensors if not name.startswith(prefix)]
    write_shard(attempt.outside, {name: source.read(name, dtype) for name in names})
