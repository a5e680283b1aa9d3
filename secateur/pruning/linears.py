"""Where a model's linears are: its family's row, held against the headers of the checkpoint at hand. Torch-free."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mode
from typing import NoReturn

from secateur.problems import ProblemError, at
from secateur.pruning.families import Family, block_count
from secateur.pruning.headers import FLOATS, ModelHeaders, Tensor

FUSED = frozenset({"gate_up_proj", "down_proj"})  # parameters that hold all experts, in transformers' memory
MOST_UNUSED = 8  # blocks behind the last; there is one in what is published
_INDEX = re.compile(r"0|[1-9][0-9]{0,9}")
_NUMBER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.)")


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear that is pruned.

    `module`: its name below the block that runs, such as `self_attn.q_proj`. `name`: that of its weight in the checkpoint,
    where it is stored (in_features, out_features) if it is `transposed`. `routed`: of an expert, which sees only the tokens
    that its router sends it.
    """

    module: str
    name: str
    out_features: int
    in_features: int
    transposed: bool = False
    routed: bool = False


def linears_of(model: ModelHeaders, family: Family) -> list[list[Linear]]:
    """The linears that are pruned, block by block; blocks may have different ones.

    Raises ProblemError `model_file_corrupt` for a linear or norm that is missing or of a wrong kind, and for a matrix in a
    block that the family does not have; `model_config_invalid` for a tensor of a block that config.json does not count.
    """
    blocks = _tensors_by_block(model, family)
    found = []
    for index in range(block_count(model, family)):  # stops at the first that is missing: the config may claim a billion
        tensors = blocks.get(index, {})
        for norm in family.norms:
            require(tensors.get(f"{norm}.weight"), f"{family.block(index)}.{norm}.weight", rank=1)
        found.append(_linears_of_block(family, family.block(index), tensors))
    return found


def widths_of(blocks: list[list[Linear]]) -> tuple[int, int]:
    """The hidden size, which most linears take, and the widest that any linear takes or gives."""
    linears = [linear for block in blocks for linear in block]
    hidden = mode(linear.in_features for linear in linears)
    return hidden, max(max(linear.out_features, linear.in_features) for linear in linears)


def unused_tensors(model: ModelHeaders, family: Family) -> list[str]:
    """The tensors of blocks behind the last, which stay as they are."""
    count = block_count(model, family)
    behind = [family.block(count + index) for index in range(_unused_blocks(model, family))]
    return [name for name in model.tensors if name.startswith(tuple(f"{block}." for block in behind))]


def _unused_blocks(model: ModelHeaders, family: Family) -> int:
    there = model.config.get(family.unused, 0) if family.unused else 0
    return there if type(there) is int and 0 <= there <= MOST_UNUSED else 0


def _tensors_by_block(model: ModelHeaders, family: Family) -> dict[int, dict[str, Tensor]]:
    prefix, count = f"{family.blocks}.", block_count(model, family) + _unused_blocks(model, family)
    blocks: dict[int, dict[str, Tensor]] = {}
    for name, tensor in model.tensors.items():
        if name.startswith(prefix):
            index, _, rest = name[len(prefix) :].partition(".")
            if not (_INDEX.fullmatch(index) and int(index) < count):
                raise ProblemError(
                    "model_config_invalid", f"config.json counts {count} blocks; '{name[:120]}' is of none of them."
                )
            blocks.setdefault(int(index), {})[rest] = tensor
    return blocks


def _linears_of_block(family: Family, block: str, tensors: Mapping[str, Tensor]) -> list[Linear]:
    """The linears in the order of the family's row, experts in theirs."""
    for module in family.linears:
        require(tensors.get(f"{module}.weight"), f"{block}.{module}.weight", rank=2)
    order = {pattern: position for position, pattern in enumerate((*family.linears, *family.optional))}
    found: list[tuple[int, list[int], Linear]] = []
    for name in tensors:
        module, _, kind = name.rpartition(".")
        if kind in FUSED and len(tensors[name].shape) == 3:
            raise at(
                "/model/id",
                "unsupported_architecture",
                f"'{block}.{name[:200]}' holds the experts of its block in one tensor, where a matrix for each is needed.",
                hint="Load the model with transformers and save it with save_pretrained(), which writes them apart.",
            )
        if kind == "weight" and len(tensors[name].shape) == 2:
            pattern = _NUMBER.sub("*", module)
            if pattern in order:
                numbers = [int(number) for number in _NUMBER.findall(module)]
                found.append((order[pattern], numbers, _linear(family, block, module, tensors[name])))
            elif pattern not in family.dense:
                _corrupt(f"The matrix '{block}.{name[:200]}' is none that a {family.architecture} has.")
    _check_experts(family, block, found)
    return [linear for *_, linear in sorted(found, key=lambda each: each[:2])]


def _check_experts(family: Family, block: str, found: list[tuple[int, list[int], Linear]]) -> None:
    """Experts are counted from nought, and each has all of the family's linears."""
    routed = Counter(number for _, numbers, _ in found for number in numbers)
    each = sum("*" in pattern for pattern in family.optional)
    if routed and routed != dict.fromkeys(range(len(routed)), each):
        odd = next((number for number in range(len(routed)) if routed[number] != each), max(routed))
        _corrupt(f"Expert {odd} of '{block}' has not each of its {each} matrices, or experts are not counted without gaps.")


def _linear(family: Family, block: str, module: str, tensor: Tensor) -> Linear:
    name = f"{block}.{module}.weight"
    out_features, in_features = require(tensor, name, rank=2).shape[:: -1 if family.transposed else 1]
    inside = family.parameter(name).removeprefix(f"{family.parameter(block)}.").removesuffix(".weight")
    return Linear(inside, name, out_features, in_features, family.transposed, routed=bool(_NUMBER.search(module)))


def require(tensor: Tensor | None, name: str, *, rank: int) -> Tensor:
    """`tensor` if it is there and of floats. Raises ProblemError `model_file_corrupt`."""
    if tensor is None:
        _corrupt(f"The tensor '{name[:200]}' is missing, which a model of this config has.")
    if len(tensor.shape) != rank or 0 in tensor.shape or tensor.dtype not in FLOATS:
        kind = "matrix" if rank == 2 else "vector"
        _corrupt(f"The tensor '{name[:200]}' is {tensor.dtype} {tensor.shape}, where a {kind} of floats is needed.")
    return tensor


def _corrupt(what: str) -> NoReturn:
    raise ProblemError("model_file_corrupt", what)
