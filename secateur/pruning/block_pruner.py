"""One block: what its linears get is observed, they are pruned, and it is written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from secateur.problems import ProblemError
from secateur.pruning.allocation import Target
from secateur.pruning.biases import bias_of
from secateur.pruning.checkpoint import DTYPES, Checkpoint, write_shard
from secateur.pruning.experts import fewest_tokens
from secateur.pruning.facts import BlockFacts, Induction, LinearFacts
from secateur.pruning.families import Family
from secateur.pruning.group_pruner import Dense, GroupPruner, Look, Observed
from secateur.pruning.guard import Guard
from secateur.pruning.induction.inducer import Inducer, Streams
from secateur.pruning.lanes import lanes
from secateur.pruning.linears import Linear, linears_of
from secateur.pruning.memory import trim
from secateur.pruning.methods import Pruned
from secateur.pruning.placed import Placed, turned
from secateur.pruning.registry import observes, sampled_share
from secateur.pruning.resume import Attempt
from secateur.pruning.stages import Group, groups_of, run_dense, run_staged
from secateur.pruning.statistics import InputMoments, InputSample, chosen_tokens, glimpse, observer
from secateur.pruning.streaming import MicroBatch, forward
from secateur.recipes import MeanCorrection, PruneRecipe


class BlockPruner:
    """One block at a time: `begin`, then one of the ways to prune it, `write`; what was done is in `facts`."""

    def __init__(
        self, recipe: PruneRecipe, source: Checkpoint, family: Family, targets: Mapping[str, Target], device: torch.device
    ) -> None:
        self._group_pruner = GroupPruner(recipe.method)
        self.linears = linears_of(source.headers, family)
        self._targets = targets
        self._observes, self._propagate = observes(recipe.method), recipe.propagate
        self._wants_mean = isinstance(recipe.method.compensation, MeanCorrection)
        self._share, self._seed = sampled_share(recipe.method), recipe.calibration.seed
        self._source, self._family = source, family
        self.dtype, self.device, self._lanes = DTYPES[recipe.output.dtype], device, lanes(device)
        self._guard: Guard | None = None
        wanted, seed = recipe.method.induction, recipe.calibration.seed
        self._inducer = Inducer(recipe.method, wanted, source.headers, family, seed) if wanted else None
        self._trims = device.type == "cpu" and not wanted  # what is freed is kept where blocks are trained
        self.begin(0)

    @property
    def observing(self) -> bool:
        """Whether the method looks at inputs."""
        return self._observes != "nothing"

    def begin(self, index: int, *, fallbacks: tuple[str, ...] = ()) -> None:
        self.facts = BlockFacts(index, fallbacks=fallbacks)
        self._changed: dict[str, Tensor] = {}
        self._emphasis: Mapping[str, Tensor] = {}

    def prune_unobserved(self) -> None:
        for linear in self.linears[self.facts.block]:
            stored = self._source.read(linear.name, self.dtype, self.device)
            dense = Dense([turned(linear, stored)], [None], [self._targets[linear.name]])
            self._prune([linear], dense, None, lambda _: None)

    def prune_observing(
        self,
        block: nn.Module,
        batches: list[MicroBatch],
        probe: MicroBatch,
        guard: Guard | None,
        *,
        learned_from: Streams | None,
        propagate: bool,
    ) -> None:
        """Prune `block` on `batches`; with `propagate` they carry its output afterwards, as the recipe says which, and so
        does the `guard`'s batch. `learned_from`: the sequences that scales are learned from, if sparsity is to be induced;
        those of the dense stream carry the dense output afterwards."""
        linears = [linear.module for linear in self.linears[self.facts.block]]
        groups = groups_of(block, self.facts.block, linears, probe)
        self._guard, self._tokens = guard, sum(batch.tokens.numel() for batch in batches)
        if guard:
            guard.enter(block, self.facts.block)
        if self._inducer and learned_from:
            self._induce(self._inducer, block, learned_from, groups)
        if self._propagate == "staged":
            self._prune_staged(block, batches, groups, propagate=propagate)
        else:
            self._prune_whole(block, batches, groups, propagate=propagate)
        if guard and propagate:
            guard.leave()
        if propagate and not all(_finite(batch.hidden) for batch in batches):
            raise self._nonfinite("its output")

    def _induce(self, inducer: Inducer, block: nn.Module, streams: Streams, groups: list[Group]) -> None:
        """Learn scales of `block`: they are folded into it, in place, or kept as the emphasis of its linears' inputs."""
        linears = self.linears[self.facts.block]
        placed = Placed(block, self.facts.block, linears, self._lanes)
        targets = {linear.module: self._targets[linear.name] for linear in linears}
        induced = inducer.induce(placed, targets, groups, streams, self._guard)
        self._emphasis = induced.emphasis
        block.load_state_dict(induced.folded, strict=False, assign=True)
        block.requires_grad_(False)
        names = self._names_in_block()
        self._changed |= {names[inside]: tensor for inside, tensor in induced.folded.items()}
        folded = tuple(sorted(self._changed.keys() - {linear.name for linear in linears}))
        refusals = inducer.pairs[placed.index].refused if inducer.pairs else ()
        refused: dict[str, str] = {refusal.kind: refusal.reason for refusal in refusals}
        self.facts.induction = Induction(induced.choice, folded, refused)

    def _names_in_block(self) -> dict[str, str]:
        """What the checkpoint calls the tensors of the block, by what the block itself does."""
        inside, stored = (f"{blocks}.{self.facts.block}." for blocks in (self._family.block_list, self._family.blocks))
        names = [name for name in self._source.headers.tensors if name.startswith(stored)]
        return {self._family.parameter(name).removeprefix(inside): name for name in names}

    def _prune_staged(self, block: nn.Module, batches: list[MicroBatch], groups: list[Group], *, propagate: bool) -> None:
        def prune(group: Group, looks: list[Look]) -> None:
            self._prune_group(block, group, self._observed(group, looks))
            if group in groups[-2:-1] and self._trims:
                trim()  # without experts a block holds the most at its last group

        run_staged(
            block, self.facts.block, batches, groups, look=self._look, prune=prune, lanes=self._lanes, propagate=propagate
        )

    def _prune_whole(self, block: nn.Module, batches: list[MicroBatch], groups: list[Group], *, propagate: bool) -> None:
        """Observe all of the dense block, then prune it; what goes on is its dense output, or that of a second forward."""
        index, dense = self.facts.block, self._propagate == "none"
        seen = {group: self._observed(group, []) for group in groups}

        def see(group: Group, looks: list[Look]) -> None:
            seen[group].add(looks)

        run_dense(
            block, index, batches, groups, look=self._look, observe=see, lanes=self._lanes, propagate=dense and propagate
        )
        for group in groups:
            self._prune_group(block, group, seen.pop(group))
        if propagate and not dense:
            forward(block, index, batches, self._lanes)

    def _look(self, inputs: Tensor) -> Look:
        """What the run takes in of a micro-batch's inputs; made in its lane."""
        moments = InputMoments(inputs.shape[-1], inputs.device) if self._wants_mean else None
        if moments:
            moments.add(inputs)
        return Look(inputs, glimpse(self._observes, inputs), moments)

    def _observed(self, group: Group, looks: list[Look]) -> Observed:
        sample = InputSample(chosen_tokens(self._tokens, self._share, self._seed)) if self._share else None
        width = self._linears_in(group)[0].in_features
        moments = InputMoments(width, self.device) if self._wants_mean else None
        statistics = observer(self._observes, width, self.device)
        observed = Observed(statistics, sample, moments, self._emphasis.get(group[0]))
        observed.add(looks)
        return observed

    def _prune_group(self, block: nn.Module, group: Group, observed: Observed) -> None:
        """Prune the linears of `group` in `block`, in place."""
        linears, modules = self._linears_in(group), [block.get_submodule(module) for module in group]
        if not bool(observed.statistics.squares.isfinite().all()):
            raise self._nonfinite(f"the input of '{linears[0].name}'")

        def place(pruned: list[Pruned]) -> None:
            for linear, module, each in zip(linears, modules, pruned, strict=True):
                module.weight = nn.Parameter(turned(linear, each.weight), requires_grad=False)
            for module, before, each in zip(modules, biases, pruned, strict=True):
                if before is not None:
                    module.bias = nn.Parameter(before if each.bias is None else each.bias, requires_grad=False)

        biases = [getattr(module, "bias", None) for module in modules]
        weights = [turned(linear, module.get_parameter("weight")) for linear, module in zip(linears, modules, strict=True)]
        targets = [self._targets[linear.name] for linear in linears]
        self._prune(linears, Dense(weights, biases, targets), observed, place)

    def _linears_in(self, group: Group) -> list[Linear]:
        by_module = {linear.module: linear for linear in self.linears[self.facts.block]}
        return [by_module[module] for module in group]

    def _prune(
        self, linears: list[Linear], dense: Dense, observed: Observed | None, place: Callable[[list[Pruned]], None]
    ) -> None:
        started = time.monotonic()
        if observed and linears[0].routed and observed.tokens < fewest_tokens(linears[0].in_features, self._observes):
            decided = self._group_pruner.prune_by_weight_alone(dense, observed.tokens, self._guard, place)
        else:
            decided = self._group_pruner.prune(dense, observed, self._guard, place)
        seconds, rows = time.monotonic() - started, sum(len(weight) for weight in dense.weights)
        for linear, target, each in zip(linears, dense.targets, decided.pruned, strict=True):
            self._changed[linear.name] = turned(linear, each.weight)
            if each.bias is not None:
                self._changed[bias_of(linear)] = each.bias
            self.facts.linears.append(
                LinearFacts(
                    name=linear.name,
                    shape=tuple(each.weight.shape),
                    target=float(target.fraction),
                    removed=int(each.removed.count_nonzero()),
                    error=each.error,
                    error_measure=each.error_measure,
                    fallbacks=each.fallbacks,
                    seconds=seconds * len(each.weight) / rows,
                    choices=decided.choices,
                )
            )

    def write(self, attempt: Attempt) -> None:
        """Every tensor of the block: those that changed, and the others as they came, cast."""
        prefix = f"{self._family.block(self.facts.block)}."
        names = [name for name in self._source.headers.tensors if name.startswith(prefix)]
        tensors = {
            name: self._changed[name] if name in self._changed else self._source.read(name, self.dtype) for name in names
        }
        write_shard(attempt.shard(self.facts.block), tensors)

    def _nonfinite(self, where: str) -> ProblemError:
        return ProblemError(
            "nonfinite_activation",
            f"In block {self.facts.block}, {where} is not finite on the calibration text.",
            hint="The weights may hold NaN or infinity, or the model may overflow in this dtype: try float32.",
        )


def _finite(hidden: Tensor) -> bool:
    """Whether all is finite. A sum, forty times as fast on a CPU, is finite only then; but it may also overflow."""
    return bool(hidden.sum().isfinite()) or bool(hidden.isfinite().all())
