"""Induction of a block: which scales there are, where they begin, that they are learned, and whether the guard agrees."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur.pruning.allocation import Target
from secateur.pruning.facts import Choice
from secateur.pruning.families import Family
from secateur.pruning.group_pruner import Look
from secateur.pruning.guard import Guard
from secateur.pruning.headers import ModelHeaders
from secateur.pruning.induction.folding import fold
from secateur.pruning.induction.initial import initial_scales
from secateur.pruning.induction.pairs import Pair, pairs_of
from secateur.pruning.induction.scales import Scale, foldable, multiplier
from secateur.pruning.induction.scores import log_scores
from secateur.pruning.induction.training import Sample, Scored, Training
from secateur.pruning.masks import removal_mask
from secateur.pruning.methods import without
from secateur.pruning.placed import Placed, turned, wearing
from secateur.pruning.randomness import generator_of
from secateur.pruning.stages import Group, run_dense
from secateur.pruning.statistics import InputMoments, InputSample, glimpse, observe
from secateur.pruning.streaming import MicroBatch, forward
from secateur.recipes import Magnitude, Method, SparsityInduction

SHARE = 8  # scores are cached of one part in so many of the calibration set: a few thousand tokens settle a norm
MOST_TOKENS = 1024  # that scales begin with


@dataclass(frozen=True, slots=True)
class Streams:
    """The calibration set before a block, a sequence each: as the pruned model has it, and as the dense one does."""

    pruned: Sequence[MicroBatch]
    dense: Sequence[MicroBatch]


@dataclass(frozen=True, slots=True)
class Induced:
    """What is to be done with the scales of a block. The one or the other is empty.

    `emphasis`: by linear, what the scores of each input are multiplied by, (in_features,). `folded`: the block's tensors, by
    their names in it, that the fold changed. `choice`: the guard's; without one it has no errors.
    """

    emphasis: Mapping[str, Tensor]
    folded: Mapping[str, Tensor]
    choice: Choice


class Inducer:
    """One for a run."""

    def __init__(self, method: Method, wanted: SparsityInduction, model: ModelHeaders, family: Family, seed: int) -> None:
        self._method, self._wanted, self._seed = method, wanted, seed
        self._initialisation = wanted.initialisation or ("rms" if isinstance(method, Magnitude) else "one")
        self.pairs = pairs_of(model, family) if isinstance(method, Magnitude) else None

    def induce(
        self,
        placed: Placed,
        targets: Mapping[str, Target],
        groups: Sequence[Group],
        streams: Streams,
        guard: Guard | None,
    ) -> Induced:
        """Learn the scales of the block that is `placed`, which is dense and stays so.

        `targets` by linear. The dense stream is carried behind the block.
        """
        seen = self._observed(placed, groups, streams.pruned)
        linears = self._scored(placed, targets, seen)
        scales = self._scales(placed.index, groups, linears)
        forward(placed.block, placed.index, list(streams.dense), placed.lanes)
        first = [self._begin(scale, seen) for scale in scales]
        tried = {"one": [torch.zeros_like(theta) for theta in first], "initial": first}
        if self._initialisation == "one":
            del tried["initial"]
        if self._wanted.epochs:
            samples = [Sample(batch, aim.hidden) for batch, aim in zip(streams.pruned, streams.dense, strict=True)]
            training = Training(placed, linears, scales, first, self._wanted)
            training.run(samples, generator_of(self._seed, placed.index, "induction"))
            tried["trained"] = training.thetas
        choice = _choice(placed, linears, scales, tried, guard)
        return self._induced(placed, scales, tried[choice.chosen], choice)

    def _observed(
        self, placed: Placed, groups: Sequence[Group], batches: Sequence[MicroBatch]
    ) -> dict[str, tuple[InputMoments, InputSample]]:
        """Of each linear's inputs in the dense block the moments, and some of them if scales begin with them."""
        part = [replace(batch) for batch in batches[: max(1, len(batches) // SHARE)]]
        tokens = sum(batch.tokens.numel() for batch in part)
        chosen = torch.arange(tokens) < (0 if self._initialisation == "one" else MOST_TOKENS)
        seen: dict[str, tuple[InputMoments, InputSample]] = {}

        def look(inputs: Tensor) -> Look:
            return Look(inputs, glimpse("moments", inputs))

        def see(group: Group, looks: list[Look]) -> None:
            if group[0] not in seen:
                inputs = looks[0].inputs
                seen.update(dict.fromkeys(group, (InputMoments(inputs.shape[-1], inputs.device), InputSample(chosen))))
            moments, sample = seen[group[0]]
            observe(moments, [each.glimpse for each in looks])
            for each in looks:
                sample.add(each.inputs)

        run_dense(
            placed.block, placed.index, part, list(groups), look=look, observe=see, lanes=placed.lanes, propagate=False
        )
        return seen

    def _scored(
        self, placed: Placed, targets: Mapping[str, Target], seen: Mapping[str, tuple[InputMoments, InputSample]]
    ) -> dict[str, Scored]:
        scored = {}
        for linear in placed.linears:
            stored = placed.block.get_submodule(linear.module).get_parameter("weight")
            weight = turned(linear, stored)  # (out_features, in_features)
            scores = log_scores(self._method, weight, seen[linear.module][0])
            scored[linear.module] = Scored(weight, scores, targets[linear.module])
        return scored

    def _scales(self, index: int, groups: Sequence[Group], linears: Mapping[str, Scored]) -> list[Scale]:
        device = next(iter(linears.values())).weight.device
        if self.pairs is None:
            return [multiplier(group, linears[group[0]].weight.shape[1], device) for group in groups]
        return [foldable(pair, linears.keys(), device) for pair in self._columns(index)]

    def _columns(self, index: int) -> list[Pair]:
        """The pairs of a block that scale columns. That of queries and keys scales rows, which no mask within one minds: it
        stays one."""
        assert self.pairs is not None, "asked for only where there is a fold"  # noqa: S101 - for the type checker
        return [pair for pair in self.pairs[index].allowed if pair.consumers]

    def _begin(self, scale: Scale, seen: Mapping[str, tuple[InputMoments, InputSample]]) -> Tensor:
        """Where the scale's logarithm begins, (free,): for columns that share an element, with the mean of theirs."""
        name = scale.linears[0]
        columns = initial_scales(self._initialisation, seen[name][1].inputs).log()
        count = scale.gathered(torch.ones_like(columns), name)  # (free,)
        return scale.centred(scale.gathered(columns, name) / count)

    def _induced(self, placed: Placed, scales: Sequence[Scale], thetas: Sequence[Tensor], choice: Choice) -> Induced:
        if choice.chosen == "one":
            return Induced({}, {}, choice)
        if self.pairs is None:
            emphasis = {
                name: scale.spread(theta, name).exp()
                for scale, theta in zip(scales, thetas, strict=True)
                for name in scale.linears
            }
            return Induced(emphasis, {}, choice)
        factors = {scale.name: theta.exp() for scale, theta in zip(scales, thetas, strict=True)}
        pairs = self._columns(placed.index)
        scaled = {side.module for pair in pairs for side in pair.sides}
        tensors = {name: each for name, each in placed.block.state_dict().items() if name.rpartition(".")[0] in scaled}
        return Induced({}, fold(tensors, pairs, factors), choice)


def _choice(
    placed: Placed,
    linears: Mapping[str, Scored],
    scales: Sequence[Scale],
    tried: Mapping[str, Sequence[Tensor]],
    guard: Guard | None,
) -> Choice:
    """That one of `tried` with which the masked block has the least error on what is held out, of equal ones the first; the
    last if there is no guard."""
    if guard is None:
        return Choice(list(tried)[-1], {})
    errors = {}
    for name, thetas in tried.items():
        shifts = {
            linear: scale.spread(theta, linear)
            for scale, theta in zip(scales, thetas, strict=True)
            for linear in scale.linears
        }

        def masked(linear: str, shifts: Mapping[str, Tensor] = shifts) -> Tensor:
            each = linears[linear]
            return without(each.weight, removal_mask(each.scores + shifts.get(linear, 0.0), each.target, "row"))

        weights = dict(zip(linears, placed.lanes.map(masked, list(linears)), strict=True))
        with wearing(placed.block, placed.linears, weights):
            errors[name] = guard.error()
    return Choice(min(errors, key=lambda name: errors[name]), errors)
