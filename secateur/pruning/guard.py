"""The guard: of several candidates for the weights of some linears, the one with which held-out sequences leave the block
closest to where the dense block takes them. What does not lower that error is refused.

Held-out sequences are calibration sequences that no statistic has seen. They go through the model twice: through its dense
blocks, which are the target, and through the pruned ones. So a candidate is judged by how far the model as pruned so far
has drifted from the dense one, and what earlier blocks did is part of it. Judged on the same input for both, as
is usual, candidates that lower the error can raise the perplexity: see docs/methods/statistical-correction.md.

A block with G groups of linears costs them 1 + 2 G forwards. They have so many of the calibration tokens that this is 9/128,
7 %, of a forward of the calibration set, which takes most of a pruning's time: a token of 128 with a Llama's four groups.
Only where that would be fewer than 16 tokens, or where there are more than two candidates, it costs more: see `cost`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from secateur.pruning.facts import Choice
from secateur.pruning.methods import Pruned
from secateur.pruning.streaming import MicroBatch, run_block

SHARE = 9 / 128  # of a forward of the calibration set
MOST_SHARE = 0.15  # what costs more than that is told
FEWEST_TOKENS = 16
ONE_OF = 32


def held_out(tokens: Tensor, groups: int, *, whole: bool = False) -> tuple[Tensor, Tensor]:
    """The calibration set, (samples, length), as what statistics are taken from and what is held out, both (…, length).

    Whole sequences are held out, the last of the set, which was drawn at random; they are cut to the number of tokens that
    the guard may have in a model whose blocks have so many `groups`. `whole`: one sequence of each `ONE_OF`, uncut, for what
    costs many forwards itself. `tokens` has two sequences or more.
    """
    if whole:
        sequences = max(1, len(tokens) // ONE_OF)
        return tokens[:-sequences], tokens[-sequences:]
    allowed = int(tokens.numel() * SHARE / (1 + 2 * groups))
    sequences = max(1, allowed // tokens.shape[1])
    return tokens[:-sequences], tokens[-sequences:, : max(allowed // sequences, FEWEST_TOKENS)]


def cost(held: Tensor, tokens: Tensor, groups: int, candidates: int) -> float:
    """What the guard takes, as a share of a forward of the calibration set `tokens`, if for each of `groups` it tries so
    many `candidates` on what is `held` out."""
    return (1 + candidates * groups) * held.numel() / tokens.numel()


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """The mean over tokens of the squared error relative to the token's squared target; both (batch, seq, hidden).

    Relative token by token, because some tokens (the first, most of all) are hundreds of times as large as the others.
    """
    wide = target.float()
    whole = wide.square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)  # (batch, seq)
    return ((output.float() - wide).square().sum(dim=-1) / whole).mean()


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate, the error that the block's output had with it, and that output, (batch, seq, hidden)."""

    name: str
    candidate: list[Pruned]
    error: float
    output: Tensor


class Guard:
    """`dense` and `pruned`: the held-out sequences on their way through the dense blocks and through the pruned ones."""

    def __init__(self, dense: MicroBatch, pruned: MicroBatch) -> None:
        self.dense, self.pruned = dense, pruned

    def enter(self, block: nn.Module, index: int) -> None:
        """Begin with block `index`, which is dense."""
        self._block, self._index = block, index
        self._target = run_block(block, index, self.dense)
        self._reached: Tensor | None = None

    def error(self) -> float:
        """That of the block's output as the block is now, on what has gone through the pruned ones."""
        return float(relative_error(run_block(self._block, self._index, self.pruned), self._target))

    def choose(
        self,
        candidates: Iterable[tuple[str, list[Pruned]]],
        place: Callable[[list[Pruned]], None],
        *known: Trial,
        least_gain: float = 0.0,
    ) -> tuple[Trial, Choice]:
        """The candidate whose error is least once `place` has put it into the block, of equal ones the first; it is in the
        block afterwards. `known`: trials that were made in this very state of the block, compared after the others.
        `least_gain`: the share of an earlier one's error by which a later one has to lower it."""
        best: Trial | None = None
        errors: dict[str, float] = {}
        for trial in chain((self._tried(name, candidate, place) for name, candidate in candidates), known):
            errors[trial.name] = trial.error
            if best is None or trial.error < best.error * (1 - least_gain):
                best = trial
        assert best is not None, "there is something to choose from"  # noqa: S101 - for the type checker
        place(best.candidate)
        self._reached = best.output
        return best, Choice(best.name, errors)

    def _tried(self, name: str, candidate: list[Pruned], place: Callable[[list[Pruned]], None]) -> Trial:
        place(candidate)
        output = run_block(self._block, self._index, self.pruned)
        return Trial(name, candidate, float(relative_error(output, self._target)), output)

    def forget(self) -> None:
        """Something was put into the block without a choice: its output is not known."""
        self._reached = None

    def leave(self) -> None:
        """Go on behind the block as it is now."""
        reached = run_block(self._block, self._index, self.pruned) if self._reached is None else self._reached
        self.dense.hidden, self.pruned.hidden = self._target, reached
