"""From a recipe's method to the new weights of linears with the same input: the method, compensation, the guard's choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor

from secateur import recipes
from secateur.pruning.allocation import Target
from secateur.pruning.compensation import compensated, mean_corrected
from secateur.pruning.energy import energy_compensated
from secateur.pruning.facts import Choice
from secateur.pruning.guard import Guard
from secateur.pruning.methods import Method, Pruned, ScoreMethod
from secateur.pruning.methods.magnitude import MagnitudeMethod
from secateur.pruning.registry import METHODS
from secateur.pruning.statistics import Glimpse, InputMoments, InputSample, Statistics, observe

_Way = tuple[Method, Tensor | None]  # with which emphasis of its scores
Place = Callable[[list[Pruned]], None]  # puts candidates into the block
LEAST_GAIN = 0.03  # of what was learned without a method's update; less than that is chance on one sequence


@dataclass(frozen=True, slots=True)
class Look:
    """What is seen of a micro-batch's inputs, (…, in_features), when it comes to a group."""

    inputs: Tensor
    glimpse: Glimpse
    moments: InputMoments | None = None


@dataclass(frozen=True, slots=True)
class Observed:
    """What is known of a group's inputs: what the method observes; what compensation is made from: a sample, or the mean;
    and the `emphasis` of each that was learned, (in_features,), a factor of its scores."""

    statistics: Statistics
    sample: InputSample | None = None
    moments: InputMoments | None = None
    emphasis: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many there were."""
        return self.statistics.count

    def add(self, looks: Sequence[Look]) -> None:
        """Take in what was seen of all micro-batches."""
        observe(self.statistics, [look.glimpse for look in looks])
        for look in looks:
            if self.moments and look.moments:
                self.moments.merge(look.moments)
            if self.sample:
                self.sample.add(look.inputs)


@dataclass(frozen=True, slots=True)
class Decided:
    """A group's new weights, and how they were chosen."""

    pruned: list[Pruned]
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True, slots=True)
class Dense:
    """Linears with the same input before they are pruned.

    `weights`: (out_features, in_features) each; `biases`: (out_features,) each, None for a linear that cannot have one.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    targets: Sequence[Target]


@dataclass(frozen=True, slots=True)
class _Task:
    """A group that is to be pruned. `prepared` is the method's own."""

    dense: Dense
    prepared: object
    observed: Observed | None


class GroupPruner:
    """One for a run, from the recipe's `parameters`."""

    def __init__(self, parameters: recipes.Method) -> None:
        card = METHODS[parameters.name]
        self._methods: dict[str, Method] = {name: card.load()(each) for name, each in parameters.alternatives.items()}
        self._updates = parameters.updates_weights
        self._wanted = parameters.compensation

    def prune(self, dense: Dense, observed: Observed | None, guard: Guard | None, place: Place) -> Decided:
        """Decide on a group's new weights, which are then in place; without a `guard` the last way is taken."""
        first = next(iter(self._methods.values()))
        task = _Task(dense, first.prepare(observed.statistics if observed else None), observed)
        wanted, ways = self._wanted, self._ways(task)
        if guard and (len(ways) > 1 or (isinstance(wanted, recipes.Correction) and wanted.guard)):
            return self._guarded(task, ways, guard, place)
        *_, (method, emphasis) = ways.values()
        return self._unchosen(self._compensated(task, _pruned(method, task, emphasis)), guard, place)

    def prune_by_weight_alone(self, dense: Dense, tokens: int, guard: Guard | None, place: Place) -> Decided:
        """What becomes of an expert that saw so few `tokens` that they say little: magnitude, row by row, and no more."""
        method = MagnitudeMethod(recipes.Magnitude(name="magnitude", comparison="row"))
        plain = method.prune(dense.weights, dense.targets, None)
        made = [replace(each, fallbacks=(f"by_weight_alone:tokens={tokens}",)) for each in plain]
        return self._unchosen(made, guard, place)

    def _unchosen(self, made: list[Pruned], guard: Guard | None, place: Place) -> Decided:
        place(made)
        if guard:
            guard.forget()
        return Decided(made)

    def _guarded(self, task: _Task, ways: Mapping[str, _Way], guard: Guard, place: Place) -> Decided:
        """Choose among the method's alternatives, each compensated; then whether the best one is."""
        newest: dict[str, list[Pruned]] = {}  # one alternative at a time: a group may be a third of a block

        def plain(name: str) -> list[Pruned]:
            if name not in newest:
                newest.clear()
                method, emphasis = ways[name]
                newest[name] = _pruned(method, task, emphasis)
            return newest[name]

        made_of = ((name, self._compensated(task, plain(name))) for name in ways)
        best, choices = guard.choose(made_of, place, least_gain=LEAST_GAIN if "trained" in ways else 0.0)
        made = [choices] if len(ways) > 1 else []
        wanted = self._wanted
        if isinstance(wanted, recipes.Correction) and wanted.guard:
            known = replace(best, name=wanted.name)
            refused = _refused(plain(best.name), best.candidate, wanted.name)
            best, choice = guard.choose([("none", refused)], place, known)
            made.append(choice)
        return Decided(best.candidate, tuple(made))

    def _ways(self, task: _Task) -> dict[str, _Way]:
        """What there is to choose from, by name. An emphasis was learned without the update of a method that makes one:
        it has to prove itself with it."""
        emphasis = task.observed.emphasis if task.observed else None
        if self._updates and emphasis is not None:
            (method,) = self._methods.values()
            return {"one": (method, None), "trained": (method, emphasis)}
        return {name: (method, emphasis) for name, method in self._methods.items()}

    def _compensated(self, task: _Task, plain: list[Pruned]) -> list[Pruned]:
        wanted, observed = self._wanted, task.observed
        if not isinstance(wanted, recipes.Correction):
            return plain
        if isinstance(wanted, recipes.EnergyCompensation):
            return [energy_compensated(weight, each, wanted) for weight, each in zip(task.dense.weights, plain, strict=True)]
        if observed and observed.moments:
            mean, linears = observed.moments.mean, zip(task.dense.weights, plain, task.dense.biases, strict=True)
            return [mean_corrected(weight, each, mean, bias) for weight, each, bias in linears]
        inputs = observed.sample.inputs if observed and observed.sample else None
        return [compensated(weight, each, wanted, inputs) for weight, each in zip(task.dense.weights, plain, strict=True)]


def _pruned(method: Method, task: _Task, emphasis: Tensor | None) -> list[Pruned]:
    dense = task.dense
    if emphasis is None:
        return method.prune(dense.weights, dense.targets, task.prepared)
    by_score = cast("ScoreMethod", method)  # no other can be asked for together with induction
    return by_score.prune(dense.weights, dense.targets, task.prepared, emphasis)


def _refused(plain: list[Pruned], tried: list[Pruned], compensation: str) -> list[Pruned]:
    """What is taken where compensation is refused, which its report then says; and why, if it was not possible at all."""
    told = f"compensation_refused:{compensation}"
    why = [next((each for each in with_it.fallbacks if each.startswith(told)), told) for with_it in tried]
    return [replace(each, fallbacks=(*each.fallbacks, reason)) for each, reason in zip(plain, why, strict=True)]
