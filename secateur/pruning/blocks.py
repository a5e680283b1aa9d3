"""The block loop: load a block, run the calibration set through it, prune its linears as their inputs arrive, write it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.problems import ProblemError
from secateur.pruning.checkpoint import DTYPES, Checkpoint, write_shard
from secateur.pruning.events import Narrator
from secateur.pruning.families import Family, block_count
from secateur.pruning.methods import Method
from secateur.pruning.registry import METHODS
from secateur.pruning.stages import Group, groups_of, run_staged
from secateur.pruning.statistics import observer
from secateur.pruning.streaming import MicroBatch, StreamedModel
from secateur.recipes import PruneRecipe

PROBE_TOKENS = 8


@dataclass(frozen=True, slots=True)
class LinearFacts:
    """What was done to one linear: `name` is its tensor's; the rest is as in `methods.Pruned`."""

    name: str
    shape: tuple[int, ...]
    removed: int
    error: float
    error_measure: str
    fallbacks: tuple[str, ...]
    seconds: float


@dataclass(slots=True)
class BlockFacts:
    """What was done to one block; linears in the order they run."""

    block: int
    seconds: float = 0.0
    linears: list[LinearFacts] = field(default_factory=list)


def prune_blocks(
    recipe: PruneRecipe, source: Checkpoint, family: Family, *, tokens: Tensor | None, shards: Path, narrator: Narrator
) -> list[BlockFacts]:
    """Prune every block of `source` and write each as a file into the folder `shards`.

    `tokens`: the calibration set, (samples, sequence_length), for a method that observes its inputs; None for another.
    Raises ProblemError `nonfinite_activation`, naming the block.
    """
    device = best_device()
    pruner = _BlockPruner(recipe, source, family, device)
    total, facts = block_count(source.headers), []
    narrator.progress(0, total)
    model = None if tokens is None else StreamedModel(source, family, pruner.dtype, device)
    batches = model.batches(tokens) if model and tokens is not None else []
    probe = model.enter(tokens[:1, :PROBE_TOKENS]) if model and tokens is not None else None
    for index in range(total):
        pruner.begin(index)
        if model and probe:
            with model.block(index) as block:
                pruner.prune_observing(block, batches, probe, propagate=index + 1 < total)
        else:
            pruner.prune_unobserved()
        pruner.write(shards / f"block-{index:05d}.safetensors")
        facts.append(pruner.end())
        narrator.progress(index + 1, total)
    return facts


def best_device() -> torch.device:
    """The first GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class _BlockPruner:
    """One block at a time: `begin`, then one of the two ways to prune it, `write`, `end`."""

    def __init__(self, recipe: PruneRecipe, source: Checkpoint, family: Family, device: torch.device) -> None:
        card = METHODS[recipe.method.name]
        self._method: Method = card.load()(recipe.method, recipe.sparsity)
        self._observes = card.observes
        self._source, self._family, self._device = source, family, device
        self.dtype = DTYPES[recipe.output.dtype]
        self.begin(0)

    def begin(self, index: int) -> None:
        self._started = time.monotonic()
        self._facts = BlockFacts(index)
        self._pruned: dict[str, Tensor] = {}

    def prune_unobserved(self) -> None:
        for name in self._family.weights(self._facts.block):
            self._prune(name, self._source.read(name, self.dtype, self._device), None)

    def prune_observing(self, block: nn.Module, batches: list[MicroBatch], probe: MicroBatch, *, propagate: bool) -> None:
        """Run `block` once over `batches`; with `propagate` they carry its pruned output afterwards."""
        index = self._facts.block

        def prune(group: Group, inputs: Iterator[Tensor]) -> None:
            linears = [_linear(block, name) for name in group]
            names = [f"{self._family.block(index)}.{name}.weight" for name in group]
            statistics = observer(self._observes, linears[0].in_features, self._device)
            for part in inputs:
                statistics.add(part)
            if not bool(statistics.squares.isfinite().all()):
                raise _nonfinite(index, f"the input of '{names[0]}'")
            prepared = self._method.prepare(statistics)
            for name, linear in zip(names, linears, strict=True):
                linear.weight = nn.Parameter(self._prune(name, linear.weight, prepared), requires_grad=False)

        groups = groups_of(block, index, self._family.linears, probe)
        run_staged(block, index, batches, groups, prune, propagate=propagate)
        if propagate and not all(bool(batch.hidden.isfinite().all()) for batch in batches):
            raise _nonfinite(index, "its output")

    def _prune(self, name: str, weight: Tensor, prepared: Any) -> Tensor:
        started = time.monotonic()
        done = self._method.prune(weight, prepared)
        self._pruned[name] = done.weight
        self._facts.linears.append(
            LinearFacts(
                name=name,
                shape=tuple(weight.shape),
                removed=int(done.removed.sum()),
                error=done.error,
                error_measure=done.error_measure,
                fallbacks=done.fallbacks,
                seconds=time.monotonic() - started,
            )
        )
        return done.weight

    def write(self, path: Path) -> None:
        """Every tensor of the block: the pruned ones, and the others as they came, cast."""
        prefix = f"{self._family.block(self._facts.block)}."
        names = [name for name in self._source.headers.tensors if name.startswith(prefix)]
        write_shard(path, {name: self._pruned.get(name, self._source.read(name, self.dtype)) for name in names})

    def end(self) -> BlockFacts:
        self._facts.seconds = time.monotonic() - self._started
        return self._facts


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    if not isinstance(module, nn.Linear):
        raise ProblemError("unsupported_architecture", f"'{name}' is a {type(module).__name__}, where a linear is needed.")
    return module


def _nonfinite(index: int, where: str) -> ProblemError:
    return ProblemError(
        "nonfinite_activation",
        f"In block {index}, {where} is not finite on the calibration text.",
        hint="The weights may hold NaN or infinity, or the model may overflow in this dtype: try float32.",
    )


def write_outside_blocks(source: Checkpoint, family: Family, dtype: torch.dtype, path: Path) -> None:
    """Write embeddings, head, final norm and whatever else is not in a block, untouched but for the cast to `dtype`."""
    prefix = f"{family.blocks}."
    names = [name for name in source.headers.tensors if not name.startswith(prefix)]
    write_shard(path, {name: source.read(name, dtype) for name in names})
