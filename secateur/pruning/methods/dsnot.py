"""DSnoT (arXiv 2310.08915): a mask is refined by swaps. In each row, removed weights come back and kept ones go, so that the
error of the expected output shrinks. Weights that stay do not change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from secateur.pruning.allocation import Target
from secateur.pruning.masks import removal_mask
from secateur.pruning.methods import Pruned, lost_share, without
from secateur.pruning.methods.magnitude import magnitude_scores
from secateur.pruning.methods.ria import ria_scores
from secateur.pruning.methods.wanda import wanda_scores
from secateur.pruning.statistics import InputMoments, Statistics
from secateur.recipes import RIA, DSnoT

# The authors' threshold is for the sum over a calibration sequence, and theirs have 2048 tokens; ours is for the mean.
TOKENS_OF_THRESHOLD = 2048
AUTHORS_CYCLES, AUTHORS_WIDTH = 50, 4096  # of Llama's attention; in narrow rows so many swaps do harm

_INITIAL: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "magnitude": lambda weight, _: magnitude_scores(weight),
    "wanda": wanda_scores,
    "ria": lambda weight, norms: ria_scores(weight, norms, RIA(name="ria").power),
}


class _Queue:
    """In each row, the columns that may be taken, best first, at most `depth` of them; separately for a negative error
    (side 0) and a positive one (side 1)."""

    def __init__(self, sides: Sequence[tuple[Tensor, Tensor]], depth: int) -> None:
        """`sides`: for each, the keys, lowest first, and who is eligible, both (rows, columns)."""
        open_keys = [keys.masked_fill(~eligible, torch.inf) for keys, eligible in sides]
        self._columns = torch.stack([keys.topk(depth, largest=False).indices for keys in open_keys], 1)  # (rows, 2, depth)
        self._left = torch.stack([eligible.sum(dim=1).clamp(max=depth) for _, eligible in sides], dim=1)  # (rows, 2)
        self._next = torch.zeros_like(self._left)

    def peek(self, side: Tensor) -> tuple[Tensor, Tensor]:
        """The next column for each row's `side`, and whether there is one; all (rows, 1)."""
        place = self._next.gather(1, side)
        there = place < self._left.gather(1, side)
        depth = self._columns.shape[2]
        picked = (side * depth + place).clamp(max=2 * depth - 1)
        return self._columns.flatten(1).gather(1, picked), there

    def take(self, side: Tensor, taken: Tensor) -> None:
        """Move on, in the rows where `taken`, (rows, 1), says so."""
        self._next.scatter_add_(1, side, taken.long())


def dsnot(
    weight: Tensor, removed: Tensor, moments: InputMoments, *, group: int | None, cycles: int, threshold: float
) -> Tensor:
    """Refine the mask `removed`, (out_features, in_features); the result has as many weights in each row, or group of
    `group` columns, as it had.

    With e = sum of W_j E[x_j] over a row's removed weights, each of up to `cycles` cycles lets that removed weight come
    back whose W_j E[x_j] / Var[x_j] lowers |e| most (section 3.2 of the paper), and removes a kept one: that with the
    lowest |W_j| ||x_j|| among those whose W_j E[x_j] lowers |e| as well, or, with `group`, the lowest one of the same
    group. A row is done once |e| <= `threshold` or nothing is left to swap; with `group`, also before e would change sign.
    """
    expected = weight.float() * moments.mean.float()  # (out_features, in_features)
    gain = expected / moments.variance.float().clamp(min=torch.finfo(torch.float32).tiny)
    scores = wanda_scores(weight, moments.squares.sqrt()).masked_fill(removed, torch.inf)  # of kept weights
    removed = removed.clone()
    depth = min(cycles, weight.shape[1])
    back = _Queue([(gain, removed & (expected < 0)), (-gain, removed & (expected > 0))], depth)
    gone = _Queue([(scores, ~removed & (expected > 0)), (scores, ~removed & (expected < 0))], depth)
    error = (expected * removed).double().sum(dim=1, keepdim=True)  # (out_features, 1)
    sign, active = error.sign(), torch.ones_like(error, dtype=torch.bool)
    for _ in range(cycles):
        side = (error > 0).long()
        come, there = back.peek(side)
        go, also_there = _lowest_of_group(scores, come, group) if group else gone.peek(side)
        after = error + (expected.gather(1, go) - expected.gather(1, come)).double()
        active = active & there & also_there & (error.abs() > threshold)
        if group:
            active = active & (after.sign() == sign)
        if not bool(active.any()):
            break
        removed.scatter_(1, come, removed.gather(1, come) & ~active)
        removed.scatter_(1, go, removed.gather(1, go) | active)
        error = torch.where(active, after, error)
        back.take(side, active)
        if group:
            scores.scatter_(1, go, scores.gather(1, go).masked_fill(active, torch.inf))
        else:
            gone.take(side, active)
    return removed


def _lowest_of_group(scores: Tensor, column: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The column with the lowest score in the group that `column`, (rows, 1), is in; and whether there is a finite one."""
    start = column // group * group
    members = start + torch.arange(group, device=scores.device)  # (rows, group)
    lowest, place = scores.gather(1, members).min(dim=1, keepdim=True)
    return start + place, lowest.isfinite()


def default_cycles(in_features: int) -> int:
    """The authors' number of swaps where rows are as wide as theirs, in proportion elsewhere, and at least one."""
    return max(1, round(AUTHORS_CYCLES * in_features / AUTHORS_WIDTH))


class DSnoTMethod:
    def __init__(self, parameters: DSnoT) -> None:
        self._parameters = parameters

    def prepare(self, statistics: Statistics | None) -> InputMoments:
        """The inputs' moments themselves."""
        assert isinstance(statistics, InputMoments), "the registry says that DSnoT observes moments"  # noqa: S101 - for the type checker
        return statistics

    def prune(self, weights: Sequence[Tensor], targets: Sequence[Target], prepared: InputMoments) -> list[Pruned]:
        return [self._prune(weight, target, prepared) for weight, target in zip(weights, targets, strict=True)]

    def _prune(self, weight: Tensor, target: Target, moments: InputMoments) -> Pruned:
        norms = moments.squares.sqrt()
        removed = removal_mask(_INITIAL[self._parameters.initial](weight, norms), target, "row")
        if set(self._parameters.skip).isdisjoint(target.name.split(".")):
            removed = dsnot(
                weight,
                removed,
                moments,
                group=target.group[1] if target.group else None,
                cycles=self._parameters.cycles or default_cycles(weight.shape[1]),
                threshold=self._parameters.threshold / TOKENS_OF_THRESHOLD,
            )
        lost = lost_share(wanda_scores(weight, norms), removed)
        return Pruned(without(weight, removed), removed, lost, "diagonal")
