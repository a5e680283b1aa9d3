"""A block's scales are learned: its output, as it is pruned by them, is to be what the dense block gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.pruning.adam import betas
from secateur.pruning.allocation import Target
from secateur.pruning.guard import relative_error
from secateur.pruning.induction.relaxation import Relaxed, gradient, relax
from secateur.pruning.induction.scales import Scale
from secateur.pruning.induction.spectral import SpectralTerm
from secateur.pruning.placed import Placed, wearing
from secateur.pruning.streaming import MicroBatch, run_block
from secateur.recipes import SparsityInduction

FEWEST_STEPS = 4  # of an epoch


@dataclass(frozen=True, slots=True)
class Scored:
    """A linear: its `weight`, (out_features, in_features), the logarithms of its `scores` at scales of one, of the same
    shape, float32, and how much of it goes."""

    weight: Tensor
    scores: Tensor
    target: Target


@dataclass(frozen=True, slots=True)
class Sample:
    """A micro-batch before a block as the pruned model has it, and what is to come out, (batch, seq, hidden)."""

    batch: MicroBatch
    target: Tensor


def sequences_of_a_step(wanted: SparsityInduction, total: int) -> int:
    """As many as are `wanted`, or fewer where `total` are too few for `FEWEST_STEPS`."""
    return min(wanted.sequences_per_step, -(-total // FEWEST_STEPS))


class Training:
    """Of one block, whose weights are frozen. Scales and optimiser are float32, the block computes in the model's dtype.

    `thetas`: the scales' logarithms, (free,) each; `begin` is where they start.
    """

    def __init__(
        self,
        placed: Placed,
        linears: Mapping[str, Scored],
        scales: Sequence[Scale],
        begin: Sequence[Tensor],
        wanted: SparsityInduction,
    ) -> None:
        self._placed, self._linears, self._scales, self._wanted = placed, linears, scales, wanted
        self.thetas = [theta.clone() for theta in begin]
        self._optimiser = torch.optim.Adam(self.thetas, lr=wanted.learning_rate, betas=betas(wanted.momentum))
        self._of_linear = {name: place for place, scale in enumerate(scales) for name in scale.linears}
        weights = {name: linear.weight for name, linear in linears.items()}
        strength, alpha = wanted.spectral_weight, wanted.spectral_alpha
        self._spectral = SpectralTerm(weights, scales, strength, alpha, placed.lanes) if strength else None
        self._of_spectral: list[Tensor] = [torch.zeros_like(theta) for theta in self.thetas]

    def run(self, samples: Sequence[Sample], generator: torch.Generator) -> None:
        """All epochs over the `samples`. Scores follow the scales without a forward: logarithms are added."""
        epochs, window = self._wanted.epochs, self._wanted.refresh_every
        order = [i for _ in range(epochs) for i in torch.randperm(len(samples), generator=generator).tolist()]
        sequences = [len(sample.target) for sample in samples]
        size = max(1, sequences_of_a_step(self._wanted, sum(sequences)) // max(sequences))
        steps = [order[start : start + size] for start in range(0, len(order), size)]
        for start in range(0, len(steps), window):
            self._refresh(start / len(steps))
            masked = {name: each.masked.requires_grad_() for name, each in self._relaxed.items()}
            with wearing(self._placed.block, self._placed.linears, masked):
                for step in steps[start : start + window]:
                    self._step(self._gradients([samples[i] for i in step]))

    def _refresh(self, progress: float) -> None:
        """Make masks and slopes of the scales as they are now. `progress`: from 0 to 1, by which the mask hardens."""
        first, last = self._wanted.temperature
        tau = first + (last - first) * progress

        def at_scale(name: str) -> Relaxed:
            linear, place = self._linears[name], self._of_linear.get(name)
            shift = self._scales[place].spread(self.thetas[place], name) if place is not None else linear.scores.new_zeros(1)
            return relax(linear.weight, linear.scores, shift, linear.target, tau)

        self._relaxed = dict(zip(self._linears, self._placed.lanes.map(at_scale, list(self._linears)), strict=True))
        if self._spectral:
            _, self._of_spectral = self._spectral.gradients(self.thetas)

    def _step(self, gradients: Mapping[str, Tensor]) -> None:
        """One step of Adam; the scales' geometric means are one afterwards. `gradients`: see `_gradients`."""
        for place, scale in enumerate(self._scales):
            total = self._of_spectral[place].clone()
            for name in scale.linears:
                total += scale.gathered(gradients[name], name)
            self.thetas[place].grad = total
        self._optimiser.step()
        for scale, theta in zip(self._scales, self.thetas, strict=True):
            theta.copy_(scale.centred(theta))

    def _gradients(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Of the mean loss on `samples` by the shift of each scaled linear's log-scores, (in_features,)."""
        lanes = self._placed.lanes
        shares = [samples[lane :: lanes.count] for lane in range(min(lanes.count, len(samples)))]
        parts, sequences = lanes.map(self._of_masked, shares), sum(len(sample.target) for sample in samples)

        def of_shift(name: str) -> Tensor:
            first, *others = (part[name] for part in parts)
            return gradient(self._relaxed[name], sum(others, start=first)) / sequences

        names = list(self._of_linear)
        return dict(zip(names, lanes.map(of_shift, names), strict=True))

    def _of_masked(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Of the sum of the sequences' losses by the masked weight of each scaled linear, of its shape."""
        weights = [self._relaxed[name].masked for name in self._of_linear]
        total: list[Tensor] = []
        for sample in samples:
            with torch.enable_grad():
                output = run_block(self._placed.block, self._placed.index, sample.batch)
                loss = relative_error(output, sample.target) * len(sample.target)
                found = torch.autograd.grad(loss, weights, materialize_grads=True)
            total = [before.add_(each) for before, each in zip(total, found, strict=True)] if total else list(found)
        return dict(zip(self._of_linear, total, strict=True))
