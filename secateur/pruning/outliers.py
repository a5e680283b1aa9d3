"""How many outliers each block has: what OWL (arXiv 2310.05175) allocates sparsity by."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from secateur.pruning.linears import Linear
from secateur.pruning.memory import give_back
from secateur.pruning.methods.wanda import wanda_scores
from secateur.pruning.stages import groups_of, run_dense
from secateur.pruning.statistics import InputNorms, glimpse, observe
from secateur.pruning.streaming import PROBE_TOKENS, MicroBatch, StreamedModel


def outlier_percentages(
    model: StreamedModel, linears: Sequence[Sequence[Linear]], tokens: Tensor, multiple: float
) -> list[float]:
    """Of each block's weights, the percentage whose Wanda score is above `multiple` times the mean of all in the block.

    One forward of the dense model over `tokens`, (samples, sequence_length).
    """
    batches, probe = model.batches(tokens), model.enter(tokens[:1, :PROBE_TOKENS])
    model.release()
    give_back()
    found: list[float] = []

    def take(index: int, batches: list[MicroBatch]) -> None:
        with model.block(index) as block:
            by_module = {linear.module: linear for linear in linears[index]}
            groups = groups_of(block, index, list(by_module), probe)
            norms = {group: InputNorms(by_module[group[0]].in_features, model.device) for group in groups}
            run_dense(
                block,
                index,
                batches,
                groups,
                look=partial(glimpse, "norms"),
                observe=lambda group, seen: observe(norms[group], seen),
                lanes=model.lanes,
                propagate=index + 1 < model.count,
            )
            weights = {name: block.get_parameter(f"{name}.weight") for name in by_module}
            scored = [
                (weights[name].T if by_module[name].transposed else weights[name], root_mean_square(norms[group]))
                for group in groups
                for name in group
            ]
            found.append(percentage_above(scored, multiple))

    for index in range(model.count):
        batches = model.within_memory(batches, partial(take, index), lambda _: None)
    return found


def root_mean_square(norms: InputNorms) -> Tensor:
    """Of each input over its tokens, (in_features,): an expert's weights do not count less for seeing fewer tokens."""
    return (norms.squares / max(norms.count, 1)).sqrt()


def percentage_above(linears: Sequence[tuple[Tensor, Tensor]], multiple: float) -> float:
    """Percentage of the Wanda scores of `linears`, all together, that are above `multiple` times their mean.

    Each is a weight, (out_features, in_features), and its inputs' norms or a multiple of all of them, (in_features,).
    """
    weights = sum(weight.numel() for weight, _ in linears)
    total = sum(float(wanda_scores(weight, norms).sum(dtype=torch.float64)) for weight, norms in linears)
    bound = multiple * total / weights
    return 100 * sum(int((wanda_scores(weight, norms) > bound).count_nonzero()) for weight, norms in linears) / weights
