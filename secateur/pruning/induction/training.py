"""A block's scales are learned: its output, as it is pruned by them, is to be what the dense block gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.pruning.allocation import Target
from secateur.pruning.guard import relative_error
from secateur.pruning.induction.relaxation import Relaxed, gradient, relax
from secateur.pruning.induction.scales import Scale
from secateur.pruning.induction.spectral import SpectralTerm
from secateur.pruning.placed import Placed, wearing
from secateur.pruning.streaming import MicroBatch, run_block
from secateur.recipes import SparsityInduction


@dataclass(frozen=True, slots=True)
class Scored:
    """A linear: its `weight`, (out_features, in_features), the logarithms of its `scores` at scales of one, of the same
    shape, float32, and how much of it goes."""

    weight: Tensor
    scores: Tensor
    target: Target


@dataclass(frozen=True, slots=True)
class Sample:
    """A sequence before a block as the pruned model has it, and what is to come out, (1, seq, hidden)."""

    batch: MicroBatch
    target: Tensor


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
        self._optimiser = torch.optim.Adam(self.thetas, lr=wanted.learning_rate)
        self._of_linear = {name: place for place, scale in enumerate(scales) for name in scale.linears}
        weights = {name: linear.weight for name, linear in linears.items()}
        strength, alpha = wanted.spectral_weight, wanted.spectral_alpha
        self._spectral = SpectralTerm(weights, scales, strength, alpha, placed.lanes) if strength else None
        self._of_spectral: list[Tensor] = [torch.zeros_like(theta) for theta in self.thetas]

    def run(self, samples: Sequence[Sample], generator: torch.Generator) -> None:
        """All epochs over the `samples`, a step for each. Scores follow the scales without a forward: logarithms are added.

        The steps between two refreshes have the same masks: their gradients do not depend on one another, and the lanes
        share them.
        """
        epochs, window = self._wanted.epochs, self._wanted.refresh_every
        order = [i for _ in range(epochs) for i in torch.randperm(len(samples), generator=generator).tolist()]
        for start in range(0, len(order), window):
            self._refresh(start / len(order))
            masked = {name: each.masked.requires_grad_() for name, each in self._relaxed.items()}
            with wearing(self._placed.block, self._placed.linears, masked):
                found = self._placed.lanes.map(self._gradients, [samples[i] for i in order[start : start + window]])
            for each in found:
                self._step(each)

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

    def _gradients(self, sample: Sample) -> dict[str, Tensor]:
        """Of the loss on a sample by the shift of each scaled linear's log-scores, (in_features,)."""
        names = list(self._of_linear)
        with torch.enable_grad():
            output = run_block(self._placed.block, self._placed.index, sample.batch)
            loss = relative_error(output, sample.target)
            found = torch.autograd.grad(loss, [self._relaxed[name].masked for name in names], materialize_grads=True)
        return {name: gradient(self._relaxed[name], each) for name, each in zip(names, found, strict=True)}
