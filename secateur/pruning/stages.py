"""Forwards of a block that pause at its linears.

Every micro-batch runs the block's own code in a greenlet, which pauses at the first linear of each group (linears with the
same input, such as q, k and v). In a staged pass all micro-batches wait there for one another: their inputs are observed,
the group is pruned, and they go on with the pruned weights. So each linear is pruned on the inputs that it will really get,
and the block runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from secateur.problems import ProblemError
from secateur.pruning.lanes import Lanes
from secateur.pruning.streaming import MicroBatch, run_block

Group = tuple[str, ...]
Look = TypeVar("Look")


def groups_of(block: nn.Module, index: int, linears: Sequence[str], probe: MicroBatch) -> list[Group]:
    """The linears of a block in the order they run, those together that get the very same tensor. `probe` is run once.

    Raises ProblemError `unsupported_architecture` if a linear is not used exactly once.
    """
    seen: list[tuple[str, Tensor]] = []

    def note(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append((name, args[0]))

    with _before({name: partial(note, name) for name in linears}, block):
        run_block(block, index, probe)
    if sorted(name for name, _ in seen) != sorted(linears):
        raise ProblemError("unsupported_architecture", f"Block {index} does not use each of {', '.join(linears)} once.")
    groups: list[list[str]] = []
    for position, (name, inputs) in enumerate(seen):
        if position and inputs is seen[position - 1][1]:
            groups[-1].append(name)
        else:
            groups.append([name])
    return [tuple(group) for group in groups]


def run_staged(
    block: nn.Module,
    index: int,
    batches: list[MicroBatch],
    groups: list[Group],
    *,
    look: Callable[[Tensor], Look],
    prune: Callable[[Group, list[Look]], None],
    lanes: Lanes,
    propagate: bool,
) -> None:
    """Run `block` once over `batches`, calling `prune` for each group with what `look` makes of its inputs.

    `look` gets the input of one micro-batch, (batch, seq, in_features), in its lane and while it is in the core's cache:
    from memory it would take four times as long. `prune` gets the looks of all micro-batches and changes the weights. With
    `propagate` the batches' hidden states become the pruned block's output, all of them or, if anything fails, none;
    without it nothing is computed after the last group.
    """

    def to_next_group(run: greenlet) -> Look:
        return look(run.switch())

    with _paused(block, index, batches, groups, lanes) as runs:
        for group in groups:
            prune(group, lanes.map(to_next_group, runs))
        if propagate:
            outputs = lanes.map(greenlet.switch, runs)
            for batch, output in zip(batches, outputs, strict=True):
                batch.hidden = output


def run_dense(
    block: nn.Module,
    index: int,
    batches: list[MicroBatch],
    groups: list[Group],
    *,
    look: Callable[[Tensor], Look],
    observe: Callable[[Group, list[Look]], None],
    lanes: Lanes,
    propagate: bool,
) -> None:
    """Run `block` as it is over `batches`, some at a time, telling `observe` what `look` makes of every group's inputs.

    `look` and `propagate` are as in `run_staged`.
    """

    def to_next_group(run: greenlet) -> Look:
        return look(run.switch())

    outputs: list[Tensor] = []
    for start in range(0, len(batches), lanes.count):
        with _paused(block, index, batches[start : start + lanes.count], groups, lanes) as runs:
            for group in groups:
                observe(group, lanes.map(to_next_group, runs))
            if propagate:
                outputs += lanes.map(greenlet.switch, runs)
    for batch, output in zip(batches, outputs, strict=False):
        batch.hidden = output


@contextmanager
def _paused(
    block: nn.Module, index: int, batches: list[MicroBatch], groups: list[Group], lanes: Lanes
) -> Iterator[list[greenlet]]:
    """A run for each micro-batch: each switch takes it to the next group's input, and the last one to its output."""

    def pause(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        lane = getcurrent().parent
        if lane is not None:  # the guard's forwards, which are in no run, go through
            lane.switch(args[0])

    with _before({group[0]: pause for group in groups}, block):
        runs = lanes.map(lambda batch: greenlet(partial(run_block, block, index, batch)), batches)
        try:
            yield runs
        finally:
            lanes.map(_end, runs)


def _end(run: greenlet) -> None:
    """Let go of what a run that was not finished holds. Only its own thread can."""
    if run:
        run.throw()


@contextmanager
def _before(hooks: dict[str, Callable[..., Any]], block: nn.Module) -> Iterator[None]:
    handles = [block.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
