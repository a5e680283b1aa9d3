"""From a recipe's method to the new weights of linears with the same input: the method, compensation, the guard's choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from secateur import recipes
from secateur.pruning.allocation import Target
from secateur.pruning.compensation import compensated
from secateur.pruning.facts import Choice
from secateur.pruning.guard import Guard
from secateur.pruning.lanes import Lanes
from secateur.pruning.methods import Method, Pruned
from secateur.pruning.methods.magnitude import MagnitudeMethod
from secateur.pruning.registry import METHODS
from secateur.pruning.statistics import InputSample, Statistics, observe

Place = Callable[[list[Pruned]], None]  # puts candidates into the block


@dataclass(frozen=True, slots=True)
class Observed:
    """What is known of a group's inputs: what the method observes, and the sample that compensation is made from, if any."""

    statistics: Statistics
    sample: InputSample | None = None

    @property
    def tokens(self) -> int:
        """How many there were."""
        return self.statistics.count

    def add(self, inputs: Sequence[Tensor], lanes: Lanes) -> None:
        """Take in all `inputs`, (…, in_features) each."""
        observe(self.statistics, inputs, lanes)
        if self.sample:
            for part in inputs:
                self.sample.add(part)


@dataclass(frozen=True, slots=True)
class Decided:
    """A group's new weights, and how they were chosen."""

    pruned: list[Pruned]
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True, slots=True)
class _Task:
    """A group that is to be pruned. `prepared` is the method's own."""

    weights: Sequence[Tensor]
    targets: Sequence[Target]
    prepared: object
    sample: Tensor | None


class GroupPruner:
    """One for a run, from the recipe's `parameters`."""

    def __init__(self, parameters: recipes.Method) -> None:
        card = METHODS[parameters.name]
        self._methods: dict[str, Method] = {name: card.load()(each) for name, each in parameters.alternatives.items()}
        self._wanted = parameters.compensation

    def prune(
        self,
        weights: Sequence[Tensor],
        targets: Sequence[Target],
        observed: Observed | None,
        guard: Guard | None,
        place: Place,
    ) -> Decided:
        """Decide on new weights for a group; without a `guard` there must be one way only. What was chosen is in its place.

        `weights`: (out_features, in_features) each.
        """
        first = next(iter(self._methods.values()))
        statistics, sample = (observed.statistics, observed.sample) if observed else (None, None)
        task = _Task(weights, targets, first.prepare(statistics), sample.inputs if sample else None)
        if guard:
            return self._guarded(task, guard, place)
        made = self._compensated(task, first.prune(weights, targets, task.prepared))
        place(made)
        return Decided(made)

    def prune_by_weight_alone(
        self, weights: Sequence[Tensor], targets: Sequence[Target], tokens: int, guard: Guard | None, place: Place
    ) -> Decided:
        """What becomes of an expert that saw so few `tokens` that they say little: magnitude, row by row, and no more."""
        method = MagnitudeMethod(recipes.Magnitude(name="magnitude", comparison="row"))
        made = [
            replace(each, fallbacks=(f"by_weight_alone:tokens={tokens}",)) for each in method.prune(weights, targets, None)
        ]
        if guard:
            guard.choose([("magnitude", made)], place)  # there is no choice, but the held-out sequences have to go on
        else:
            place(made)
        return Decided(made)

    def _guarded(self, task: _Task, guard: Guard, place: Place) -> Decided:
        """Choose among the method's alternatives, each compensated; then whether the best one is."""

        def plain(name: str) -> list[Pruned]:
            return self._methods[name].prune(task.weights, task.targets, task.prepared)

        best, choices = guard.choose(((name, self._compensated(task, plain(name))) for name in self._methods), place)
        made = [choices] if len(self._methods) > 1 else []
        wanted = self._wanted
        if isinstance(wanted, recipes.Correction) and wanted.guard:
            known = replace(best, name=wanted.name)
            best, choice = guard.choose([("none", _refused(plain(best.name), wanted.name))], place, known)
            made.append(choice)
        return Decided(best.candidate, tuple(made))

    def _compensated(self, task: _Task, plain: list[Pruned]) -> list[Pruned]:
        if not isinstance(self._wanted, recipes.Correction):
            return plain
        return [
            compensated(weight, each, self._wanted, task.sample) for weight, each in zip(task.weights, plain, strict=True)
        ]


def _refused(plain: list[Pruned], compensation: str) -> list[Pruned]:
    """What is taken where compensation is refused, which its report then says."""
    return [replace(each, fallbacks=(*each.fallbacks, f"compensation_refused:{compensation}")) for each in plain]
