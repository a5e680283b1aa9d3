"""What a run will cost, from the model's config and headers alone: work, memory, disk, seconds. Torch-free.

Work is counted in operations, two to a multiplication with its addition. What memory and not arithmetic holds up (norms,
activations, masks) is counted as the operations that take as long; those rates, and what a process takes of itself, were
measured with the demo model (`make bench-estimate`). Seconds are work over a pace, the operations a second of a worker.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Any

from secateur.pruning.datasets import known_bytes
from secateur.pruning.discovery import family_of
from secateur.pruning.headers import ModelHeaders
from secateur.pruning.linears import Linear, linears_of, widths_of
from secateur.pruning.registry import METHODS, calibration_of
from secateur.recipes import ALPS, ElasticRecipe, ModelRecipe, Perplexity, PruneRecipe, Recipe

DTYPE_BYTES: Mapping[str, int] = {"bfloat16": 2, "float32": 4}

# Operations that take as long as one element's way through norms, activations and rotations; through a statistic of vectors;
# through a slice of the logits; and as one weight's way through masks, files and digests.
_PER_ACTIVATION, _PER_OBSERVED, _PER_LOGIT, _PER_WEIGHT = 500.0, 150.0, 500.0, 5_000.0
_PER_CUBE, _PER_SWEPT = 10.0, 20.0  # of a factorisation, d^3; of SparseGPT's sweep, out x in^2
_PER_SPECTRUM = 20.0  # of singular values, out x in^2
_PER_CUBE_OF_EIGENVECTORS, _SETTLED = 60.0, 0.4  # of ALPS: the decomposition; the share of its iterations that are needed

# Forwards that induction is worth: the dense model's and the statistics, and for each epoch one with two back and the masks.
# Less than are made: those have larger micro-batches. By runs with it and without (`make bench-induction`).
_INDUCED, _INDUCED_EACH = 1.1, 3.2

# Operations a second of a worker that has not measured its own yet.
DEFAULT_PACE: Mapping[str, float] = {"cpu": 5e11, "gpu": 4e13}
# Two processes begin, load their libraries and tokenise; at the end files are checked, digested and stored.
STARTUP_SECONDS = 12.0
_FILE_BYTES_PER_SECOND = 60e6  # for all reads and writes of the final files together
SPREAD = 1.6  # the range of seconds is the guess divided and multiplied by this
UNMEASURED_SPREAD = 5.0

_PROCESS_BYTES = 440e6  # torch, transformers and a tokenizer
_TRAINED_BYTES = 40  # of a weight that is trained: master, gradient, Adam's two moments, weights, ranks and masks
_INDUCED_BYTES = 16  # of a weight of a block that is induced: scores, masked weight, slope, share, gradients
_PASSES_KEPT = 4  # times the intermediate results of a forward that a backward pass needs
_MICRO_BATCH_TOKENS = 2048
_LOGITS_BYTES = 2 * (32 << 20)
_TEXT_BYTES_PER_TOKEN = 4.5
_HUB_EVALUATION_BYTES: Mapping[str, int] = {"wikitext2": 1_300_000, "c4": 2_400_000}

_LEAVES_A_GROUP = re.compile(r"(o_proj|out_proj|dense|c_proj|down_proj|dense_4h_to_h|fc2|fc_out|w2)$")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Shape:
    """A model as far as its cost depends on it. `share`: the part of all tokens that a routed expert sees."""

    blocks: list[list[Linear]]
    parameters: int
    hidden: int
    vocabulary: int
    share: float = 1.0

    @cached_property
    def linears(self) -> list[Linear]:
        return [linear for block in self.blocks for linear in block]

    @cached_property
    def pruned(self) -> int:
        """Weights of all linears that are pruned."""
        return sum(map(_weights, self.linears))

    @cached_property
    def middle(self) -> int:
        """The widest that a linear takes or gives."""
        return max(max(linear.out_features, linear.in_features) for linear in self.linears)

    def seen(self, linear: Linear) -> float:
        """The part of all tokens that the linear sees."""
        return self.share if linear.routed else 1.0

    @cached_property
    def groups(self) -> list[list[Linear]]:
        """Linears with the same input, as far as names tell: q, k and v; gate and up."""
        found: dict[tuple[int, str], list[Linear]] = defaultdict(list)
        for index, block in enumerate(self.blocks):
            for linear in block:
                parent = linear.module.rpartition(".")[0]
                alone = _LEAVES_A_GROUP.search(linear.module) is not None
                found[index, linear.module if alone else f"{parent}/{linear.in_features}"].append(linear)
        return list(found.values())


def _weights(linear: Linear) -> int:
    return linear.out_features * linear.in_features


@dataclass(frozen=True, slots=True)
class Estimate:
    """`parameters` of the model, `pruned_parameters` of the linears that are pruned; tokens; `operations` of forwards and
    products as one would count them, and `work`, which `seconds` is made of; bytes at their highest. `device_bytes` is the
    part of `memory_bytes` that a GPU would hold, `kept_bytes` what of `disk_bytes` is still taken after the run."""

    parameters: int
    pruned_parameters: int
    calibration_tokens: int
    evaluation_tokens: int
    operations: float
    work: float
    memory_bytes: int
    device_bytes: int
    disk_bytes: int
    kept_bytes: int
    warnings: tuple[str, ...]

    def seconds(self, pace: float, *, spread: float) -> tuple[float, float]:
        """From and to how many seconds, at `pace` operations a second."""
        guess = STARTUP_SECONDS + self.disk_bytes / _FILE_BYTES_PER_SECOND + self.work / pace
        return guess / spread, guess * spread


@dataclass(frozen=True, slots=True)
class Work:
    """Operations of a step: as one would count them, and with all that takes as long."""

    operations: float = 0.0
    total: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.total + other.total)

    def __mul__(self, times: float) -> Work:
        return Work(self.operations * times, self.total * times)


def estimate(recipe: Recipe, model: ModelHeaders, *, local_store: bool = True, lanes: int | None = None) -> Estimate:
    """What a run of `recipe` on `model`, which `admission.check` has let pass, will cost.

    An evaluation of the dense model is counted, though an earlier job may have made it. `lanes`: how many micro-batches a
    worker without a GPU runs side by side, which is one a core; by default as many as this machine has. Raises ProblemError
    `unsupported_architecture`.
    """
    shape, warnings, lanes = shape_of(model), [], lanes or os.cpu_count() or 1
    if model.format == "gguf":
        warnings.append("a GGUF file is converted first, in memory as a whole; its shape is guessed from its size")
    perplexity, calibration = recipe.evaluation.perplexity, calibration_of(recipe)
    evaluated = evaluation_tokens(perplexity) if perplexity else 0
    observed = calibration.samples * calibration.sequence_length if calibration else 0
    work = Work()
    if perplexity:
        work += _evaluation_work(shape, evaluated, perplexity.sequence_length) * (
            2 if isinstance(recipe, ModelRecipe) else 1
        )
    if isinstance(recipe, PruneRecipe):
        work += pruning_work(recipe, shape)
    if isinstance(recipe, ElasticRecipe):
        work += _evaluation_work(shape, observed, recipe.calibration.sequence_length) * _forwards_of(recipe)
        work += _evaluation_work(shape, evaluated, perplexity.sequence_length if perplexity else 1) * (
            len(recipe.evaluation.sparsities) - 1
        )
    host, device = (_device_bytes(recipe, shape, observed, evaluated, each) for each in (lanes, 1))
    return Estimate(
        parameters=shape.parameters,
        pruned_parameters=shape.pruned,
        calibration_tokens=observed,
        evaluation_tokens=evaluated,
        operations=work.operations,
        work=work.total,
        memory_bytes=int(_PROCESS_BYTES + max(host, 2 * shape.parameters if model.format == "gguf" else 0)),
        device_bytes=device,
        disk_bytes=disk_bytes(recipe, model, local_store=local_store),
        kept_bytes=_output_bytes(recipe, model) if local_store else 0,
        warnings=tuple(warnings),
    )


def shape_of(model: ModelHeaders) -> Shape:
    """The model's shape by its family and headers; of a GGUF file a guess. Raises the problems of `linears_of`."""
    if model.format == "gguf":
        return _guessed(model.bytes)
    family, config = family_of(model), model.config
    blocks = linears_of(model, family)
    experts = max((len(_numbered(block)) for block in blocks), default=0)
    share = min(1.0, _positive(config.get("num_experts_per_tok"), 1) / experts) if experts else 1.0
    hidden, _ = widths_of(blocks)  # an embedding may be narrower
    return Shape(blocks, model.parameters, hidden, model.tensors[family.embedding].shape[0], share)


def _numbered(block: list[Linear]) -> set[str]:
    """The experts of a block, by number."""
    return {found[1] for linear in block if (found := _EXPERT.search(linear.name))}


def _positive(value: object, otherwise: int) -> int:
    return value if type(value) is int and value > 0 else otherwise


def _guessed(parameters: int) -> Shape:
    """A model of 32 blocks with about as many parameters as its GGUF file has bytes."""
    hidden = max(64, round((parameters / (32 * 12)) ** 0.5))
    shapes = {"attn.qkv": (4 * hidden, hidden), "mlp.up_proj": (4 * hidden, hidden), "mlp.down_proj": (hidden, 4 * hidden)}
    block = [Linear(module, module, *shape) for module, shape in shapes.items()]
    return Shape([block] * 32, parameters, hidden, 32_000)


def evaluation_tokens(wanted: Perplexity) -> int:
    """About how many tokens the windows have: what a text gives is known when it is tokenised."""
    there = known_bytes(wanted.dataset, "evaluation") or _HUB_EVALUATION_BYTES[wanted.dataset]
    windows = max(1, int(there / _TEXT_BYTES_PER_TOKEN) // wanted.sequence_length)
    return wanted.sequence_length * min(windows, wanted.max_windows or windows)


def forward_work(shape: Shape, tokens: int, length: int) -> Work:
    """All blocks once over `tokens` in sequences of `length`."""
    products = 2 * sum(_weights(linear) * shape.seen(linear) for linear in shape.linears)
    attention = 2 * length * shape.hidden * len(shape.blocks)  # causal: half of all pairs
    elements = len(shape.blocks) * (8 * shape.hidden + 3 * shape.middle)
    return Work(tokens * (products + attention), tokens * (products + attention + _PER_ACTIVATION * elements))


def _evaluation_work(shape: Shape, tokens: int, length: int) -> Work:
    head = tokens * 2.0 * shape.hidden * shape.vocabulary
    return forward_work(shape, tokens, length) + Work(head, head + _PER_LOGIT * tokens * shape.vocabulary)


def pruning_work(recipe: PruneRecipe, shape: Shape) -> Work:
    """The block loop: forwards, statistics, and what the method does with them."""
    calibration = calibration_of(recipe)
    work = Work(0, _PER_WEIGHT * shape.pruned)
    if recipe.sparsity.allocation.looks_at == "weights":
        work += Work(0, _PER_SPECTRUM * sum(float(_weights(linear)) * linear.in_features for linear in shape.linears))
    if calibration is None:
        return work
    tokens, groups = calibration.samples * calibration.sequence_length, shape.groups
    passes: float = 1 + (recipe.propagate == "block") + (recipe.sparsity.allocation.looks_at == "inputs")
    if induction := recipe.method.induction:
        passes += _INDUCED + _INDUCED_EACH * induction.epochs
    work += forward_work(shape, tokens, calibration.sequence_length) * passes
    inputs = [(group[0].in_features, shape.seen(group[0])) for group in groups]
    if METHODS[recipe.method.name].observes != "gram":
        return work + Work(0, _PER_OBSERVED * tokens * sum(width * share for width, share in inputs))
    gram = tokens * sum(2.0 * width * (width + 256) * share for width, share in inputs)
    cubes = sum(float(width) ** 3 for width, _ in inputs)
    swept = sum(float(_weights(linear)) * linear.in_features for linear in shape.linears)
    work += Work(gram + cubes + 2 * swept, gram + _PER_CUBE * cubes + _PER_SWEPT * swept)
    if isinstance(recipe.method, ALPS):
        products = 4.0 * _SETTLED * recipe.method.iterations + 2.0 * recipe.method.cg_iterations
        work += Work(products * swept, products * swept + _PER_CUBE_OF_EIGENVECTORS * cubes)
    return work


def _device_bytes(recipe: Recipe, shape: Shape, observed: int, evaluated: int, lanes: int) -> int:
    """Weights, activations and statistics at their highest: of pruning or of evaluating, whichever holds more."""
    size = DTYPE_BYTES[recipe.compute_dtype]
    block = 2 * size * max(sum(map(_weights, block)) for block in shape.blocks)
    outside = size * shape.hidden * shape.vocabulary
    pruning = evaluating = 0.0
    if isinstance(recipe, PruneRecipe):
        activations = observed * size * max(4 * shape.hidden, 2 * shape.hidden + shape.middle)
        if recipe.method.induction:
            activations += observed * size * shape.hidden  # the dense stream
            graph = _batches_bytes(shape, size, observed, lanes)  # a backward pass needs so much beside a forward, measured
            activations += graph + _INDUCED_BYTES * block // (2 * size)
        walked = activations + block + _batches_bytes(shape, size, observed, lanes) + _method_bytes(recipe, shape)
        pruning = walked + outside if observed else max(walked, outside)
    if isinstance(recipe, ElasticRecipe):
        streams = 2 * (1 + (3 if recipe.method.streams == "groups" else 1))
        trained = _TRAINED_BYTES * max(sum(map(_weights, block)) for block in shape.blocks)
        passes = _batches_bytes(shape, size, recipe.calibration.sequence_length, lanes)
        pruning = outside + block + streams * observed * size * shape.hidden + trained + _PASSES_KEPT * passes
    if evaluated:
        head = outside + lanes * _LOGITS_BYTES
        evaluating = evaluated * size * shape.hidden + max(head, block + _batches_bytes(shape, size, evaluated, lanes))
    return int(max(pruning, evaluating))


def _forwards_of(recipe: ElasticRecipe) -> float:
    """Forwards that training an elastic model is worth: for each band of a step one forward and two back, one of the dense
    model, and one at each band's rate for the next block's inputs."""
    bands = {"seven": 7, "three": 3}.get(str(recipe.method.bands), len(recipe.method.bands))
    trained = bands if recipe.method.every_band else min(bands, 3)
    return 3 * recipe.method.epochs * trained + 1 + bands


def _batches_bytes(shape: Shape, size: int, tokens: int, lanes: int) -> int:
    """Intermediate results of the micro-batches that run side by side: see `memory.batch_tokens`."""
    return min(tokens, lanes * _MICRO_BATCH_TOKENS) * (8 * shape.hidden + 3 * shape.middle) * (size + 4)


def _method_bytes(recipe: PruneRecipe, shape: Shape) -> int:
    """The widest group's statistics and what its sweep works on, in float32."""
    if METHODS[recipe.method.name].observes != "gram":
        return 4 * 3 * max(map(_weights, shape.linears))
    matrices = 6 if isinstance(recipe.method, ALPS) else 3
    return max(4 * (matrices * group[0].in_features ** 2 + 5 * sum(map(_weights, group))) for group in shape.groups)


def disk_bytes(recipe: Recipe, model: ModelHeaders, *, local_store: bool) -> int:
    """Bytes of disk that a run takes at its height: the finished blocks, the files gathered from them and, if the store is
    on this disk, what it keeps. Of a GGUF model the parameters are taken to be as many as its bytes, which lies between the
    common quantisations, and there is a dequantised copy before the run. A job that writes no model takes no more."""
    parameters = model.parameters or model.bytes
    converted = parameters * DTYPE_BYTES["bfloat16"] if model.format == "gguf" else 0
    return converted + _output_bytes(recipe, model) * (3 if local_store else 2)


def _output_bytes(recipe: Recipe, model: ModelHeaders) -> int:
    parameters = model.parameters or model.bytes
    return parameters * DTYPE_BYTES[recipe.output.dtype] if isinstance(recipe, ModelRecipe) else 0


def pace_of(measured: Collection[float], device: str) -> tuple[float, bool]:
    """Operations a second to count on, and whether they were measured: the median, or the default of `device`."""
    return (median(measured), True) if measured else (DEFAULT_PACE[device], False)


def measured_pace(recipe: Recipe, model: ModelHeaders, metrics: Mapping[str, Any]) -> float | None:
    """Operations a second of a run that has these `metrics`; None if it has timed nothing."""
    shape, seconds, work = shape_of(model), metrics["seconds"], 0.0
    if isinstance(recipe, PruneRecipe):
        work += pruning_work(recipe, shape).total
    if "evaluate" in seconds:
        stated = metrics["perplexity"]["protocol"]
        tokens = stated["windows"] * stated["sequence_length"]
        work += _evaluation_work(shape, tokens, stated["sequence_length"]).total
    spent = sum(seconds.get(step, 0.0) for step in ("prune", "evaluate"))
    return work / spent if spent and work else None
