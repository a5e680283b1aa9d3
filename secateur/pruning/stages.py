"""One forward of a block in which each linear is pruned as its input arrives.

Every micro-batch runs the block's own code in a greenlet. When it reaches the first linear of a group (linears with the
same input, such as q, k and v) it pauses; when all have, their inputs are observed, the group is pruned, and they go on
with the pruned weights. So each linear is pruned on the inputs that it will really get, and the block runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from secateur.problems import ProblemError
from secateur.pruning.streaming import MicroBatch, run_block

Group = tuple[str, ...]


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
    prune: Callable[[Group, Iterator[Tensor]], None],
    *,
    propagate: bool,
) -> None:
    """Run `block` once over `batches`, calling `prune` for each group with its inputs, (batch, seq, in_features) each.

    `prune` takes all the inputs, one micro-batch at a time, and changes the weights. With `propagate` the batches' hidden
    states become the pruned block's output; without it nothing is computed after the last group.
    """
    hub = getcurrent()

    def pause(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        hub.switch(args[0])

    runs = [greenlet(partial(run_block, block, index, batch)) for batch in batches]
    with _before({group[0]: pause for group in groups}, block):
        for group in groups:
            prune(group, (run.switch() for run in runs))
        if propagate:
            for run, batch in zip(runs, batches, strict=True):
                batch.hidden = run.switch()


@contextmanager
def _before(hooks: dict[str, Callable[..., Any]], block: nn.Module) -> Iterator[None]:
    handles = [block.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
