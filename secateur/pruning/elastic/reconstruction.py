"""Block-wise reconstruction: the chains of a block (and, if wanted, its weights) are trained until the block, masked at any
rate, gives what the dense block gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from secateur.problems import ProblemError
from secateur.pruning.adam import betas
from secateur.pruning.elastic.bands import bands_of, schedule, widths
from secateur.pruning.elastic.chain import Chain, gradients, masked_sum, new_chain
from secateur.pruning.elastic.linear import ElasticLinear, Linears
from secateur.pruning.elastic.nested import kept_bits, removal_ranks
from secateur.pruning.methods import BITS
from secateur.pruning.placed import Placed, wearing
from secateur.pruning.streaming import MicroBatch, run_block
from secateur.recipes import Epts

RENEWALS = 4  # how often, while a block's weights are trained, its masks are made anew


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sample:
    """Some sequences before a block: in `streams`, for each band, as it is to be trained on them; and `target`, what is to
    come out, (batch, seq, hidden)."""

    streams: Sequence[MicroBatch]
    target: Tensor


@dataclass(frozen=True, slots=True)
class Trained:
    """A block's linears after training, by their names below it, and of each band the mean relative error in training."""

    linears: dict[str, ElasticLinear]
    errors: list[float | None]


def without_chain(weights: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> dict[str, ElasticLinear]:
    """Linears that have their masks and nothing more: at any rate what Wanda makes of them."""
    return {
        name: ElasticLinear(
            weight, norms[name], Chain(weight.new_zeros(len(weight), 0), weight.new_zeros(0, weight.shape[1]))
        )
        for name, weight in weights.items()
    }


def reconstruct(
    placed: Placed, dense: Linears, samples: Sequence[Sample], method: Epts, generator: torch.Generator
) -> Trained:
    """Train the linears of a block on `samples`.

    `dense`: the linears as they came; what comes back is rounded to the dtype they have. Raises ProblemError
    `nonfinite_activation` if training comes to a value that is not finite.
    """
    training = Training(placed, dense, method, generator)
    size = min(method.sequences_per_step, len(samples))
    steps = max(1, int(method.epochs * len(samples)) // size)
    passes = math.ceil(steps * size / len(samples))
    order = [i for _ in range(passes) for i in torch.randperm(len(samples), generator=generator).tolist()]
    plan = schedule(training.bands, steps, generator, every_band=method.every_band)
    for step, pairs in enumerate(plan):
        if method.train_base and step and step % max(1, steps // RENEWALS) == 0:
            training.renew_masks()
        training.accumulate(pairs, [samples[i] for i in order[step * size : (step + 1) * size]])
        training.update(0.5 * (1 + math.cos(math.pi * step / steps)))
    return training.result()


class Training:
    """Masters and optimiser of one block. Masters and the optimiser's state are float32, what is computed in the model's."""

    def __init__(self, placed: Placed, dense: Linears, method: Epts, generator: torch.Generator) -> None:
        self._placed, self._dense, self._method = placed, dense, method
        self.bands = bands_of(method)
        self._widths = widths(self.bands)
        self.chains = {name: self._new_chain(linear, generator) for name, linear in dense.items()}
        self._weights = {name: linear.weight for name, linear in dense.items()}
        self._masters: dict[str, Tensor] = {}
        if method.train_base:
            self._masters = {name: weight.to(torch.float32, copy=True) for name, weight in self._weights.items()}
            self._weights = {name: weight.clone() for name, weight in self._weights.items()}
        self._ranks: dict[str, Tensor] = {}
        self.renew_masks()
        self._optimisers = {name: self._optimiser(name) for name in dense}
        self._of_weights: dict[str, Tensor] = {}  # the step's gradients so far, in the model's dtype
        self._errors: list[list[Tensor]] = [[] for _ in self.bands]

    def _optimiser(self, name: str) -> torch.optim.Adam:
        """Of one linear, so that linears are updated side by side."""
        groups = [{"params": [self.chains[name].up, self.chains[name].down], "lr": self._method.learning_rate}]
        if name in self._masters:
            groups.append({"params": [self._masters[name]], "lr": self._method.base_learning_rate})
        return torch.optim.Adam(groups, betas=betas(self._method.momentum), fused=True)

    def _each(self, work: Callable[[str], T]) -> dict[str, T]:
        """`work` of every linear's name, linears side by side."""
        return dict(zip(self._dense, self._placed.lanes.map(work, list(self._dense)), strict=True))

    def _new_chain(self, linear: ElasticLinear, generator: torch.Generator) -> Chain:
        fresh = new_chain((linear.weight.shape[0], linear.weight.shape[1]), self._widths[-1], generator)
        return Chain(fresh.up.to(linear.weight.device), fresh.down.to(linear.weight.device))

    def accumulate(self, pairs: Sequence[tuple[int, float]], samples: Sequence[Sample]) -> None:
        """Add the gradients of one step: for each (band, rate), from low to high, those on all `samples`. One band's
        intermediate results are held at a time.

        The lowest band of the step is to give the dense output; of what the others are to give, its output is a share.
        """
        wanted = [sample.target.float() for sample in samples]
        for position, (band, rate) in enumerate(pairs):
            made = self._each(partial(self._masked, rate=rate, width=self._widths[band]))
            kept, weights = ({name: pair[part] for name, pair in made.items()} for part in (0, 1))
            with wearing(self._placed.block, self._placed.linears, weights):
                done = self._placed.lanes.map(
                    partial(_backward, self._placed, list(weights.values()), self._method.loss_power),
                    [(sample, band, aim) for sample, aim in zip(samples, wanted, strict=True)],
                )
            parts = dict(zip(weights, zip(*(each.gradients for each in done), strict=True), strict=True))
            self._each(partial(self._add, parts=parts, kept=kept, width=self._widths[band]))
            self._errors[band] += [each.error for each in done]
            if position == 0:
                # |f - t|^2 (1 - a) + |f - g|^2 a is |f - (1 - a) t - a g|^2 but for a constant: one difference less.
                share = self._method.self_distillation
                wanted = [torch.lerp(aim, each.output, share) for aim, each in zip(wanted, done, strict=True)]

    def _masked(self, name: str, *, rate: float, width: int) -> tuple[Tensor, Tensor]:
        """A linear's mask at a rate, in bits as `masked_sum` wants it, and its weight, of which gradients can be taken."""
        weight = self._weights[name]
        kept = kept_bits(self._ranks[name], int(weight.shape[1] * rate), BITS[weight.element_size()])
        return kept, masked_sum(weight, self.chains[name], width, kept).requires_grad_()

    def _add(self, name: str, *, parts: Mapping[str, Sequence[Tensor]], kept: Mapping[str, Tensor], width: int) -> None:
        """Add to the gradients of a linear's chain and master. `parts`: those by its weight at a rate, of each sample."""
        first, *others = parts[name]
        chain = self.chains[name]
        of_weight, of_chain = gradients(sum(others, start=first), chain, width, kept[name])
        _gradient_of(chain.up)[:, :width] += of_chain.up
        _gradient_of(chain.down)[:width] += of_chain.down
        if name in self._masters:
            before = self._of_weights.get(name)
            self._of_weights[name] = of_weight if before is None else before.add_(of_weight)

    def update(self, factor: float) -> None:
        """One step of Adam at `factor` times the learning rates; gradients are gone afterwards."""
        self._each(partial(self._update, factor=factor))

    def _update(self, name: str, *, factor: float) -> None:
        rates = (self._method.learning_rate, self._method.base_learning_rate)
        for group, rate in zip(self._optimisers[name].param_groups, rates, strict=False):
            group["lr"] = rate * factor
        if name in self._masters:
            self._masters[name].grad = self._of_weights.pop(name).float()
        self._optimisers[name].step()
        self._optimisers[name].zero_grad()
        if name in self._masters:
            self._weights[name].copy_(self._masters[name])

    def renew_masks(self) -> None:
        """Make the masks of what the weights are now."""
        self._ranks = self._each(lambda name: removal_ranks(self._linear(name).importance()))

    def _linear(self, name: str) -> ElasticLinear:
        return replace(self._dense[name], weight=self._weights[name])

    def result(self) -> Trained:
        errors = [float(torch.stack(each).mean()) if each else None for each in self._errors]
        if any(error is not None and not math.isfinite(error) for error in errors):
            raise ProblemError(
                "nonfinite_activation",
                f"Training block {self._placed.index} came to a value that is not finite.",
                hint="Lower learning_rate and base_learning_rate, or take float32.",
            )
        linears = {}
        for name, chain in self.chains.items():
            linear = self._linear(name)
            dtype = linear.weight.dtype
            # + 0.0: a weight that became -0.0 would be a zero that no mask made
            rounded = Chain(chain.up.to(dtype), chain.down.to(dtype))
            linears[name] = replace(linear, weight=linear.weight + 0.0, chain=rounded)
        return Trained(linears, errors)


def _gradient_of(tensor: Tensor) -> Tensor:
    """The tensor's gradient so far, of its shape."""
    if tensor.grad is None:
        tensor.grad = torch.zeros_like(tensor)
    return tensor.grad


@dataclass(frozen=True, slots=True)
class _Done:
    """A sample's output, float32, (batch, seq, hidden); its squared error relative to the squared target, a scalar; and the
    gradients of its loss by the block's weights."""

    output: Tensor
    error: Tensor
    gradients: tuple[Tensor, ...]


def _backward(placed: Placed, weights: list[Tensor], power: float, given: tuple[Sample, int, Tensor]) -> _Done:
    """Run the block forward and back for a sample, as a band has it, and what that is to give, (batch, seq, hidden)."""
    sample, band, wanted = given
    with torch.enable_grad():
        output = run_block(placed.block, placed.index, sample.streams[band]).float()
        of_weights = torch.autograd.grad(loss(output, wanted, power), weights, materialize_grads=True)
    made, dense = output.detach(), sample.target.float()
    return _Done(made, (made - dense).square().sum() / dense.square().sum(), of_weights)


def loss(output: Tensor, target: Tensor, power: float) -> Tensor:
    """Squared error summed over positions, mean over sequences and hidden features, to a `power`: at 0.5 bands whose errors
    are small count for as much as those whose errors are large. Both (batch, seq, hidden), float32."""
    squared = (output - target).square().sum(dim=1).mean()
    return (squared + torch.finfo(squared.dtype).tiny) ** power
