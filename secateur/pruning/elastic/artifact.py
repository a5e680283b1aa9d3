"""The elastic artifact: an ordinary checkpoint, the base; a header and one safetensors file with what makes it elastic.
elastic. What is read back is hostile input.

    elastic.json          version, bands, blocks whose lowest band has no pair, digests
    elastic.safetensors   of each linear `up`, `down` (bfloat16 or as the base) and `norms` (float32)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from secateur.problems import ProblemError
from secateur.pruning.checkpoint import Checkpoint, open_shard, sha256_of, write_shard
from secateur.pruning.elastic.bands import widths
from secateur.pruning.elastic.chain import Chain
from secateur.pruning.elastic.linear import ElasticLinear, Linears
from secateur.pruning.families import Family
from secateur.pruning.headers import FLOATS, MAX_CONFIG_BYTES, ModelHeaders, parse_object, refuse_above
from secateur.pruning.linears import Linear
from secateur.pruning.placed import turned
from secateur.pruning.resume import Attempt
from secateur.recipes import Band

HEADER, TENSORS = "elastic.json", "elastic.safetensors"
UP, DOWN, NORMS = "elastic_up", "elastic_down", "input_norms"

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Header(BaseModel):
    """`elastic.json`. `low_band_off`: blocks whose lowest band uses masks alone. `base_trained`: whether the base's weights
    may differ from the source model's. `base_sha256`: of the base checkpoint; `tensors_sha256`: of `elastic.safetensors`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: Literal["secateur-elastic"] = "secateur-elastic"
    version: Literal[1] = 1
    bands: Annotated[list[Band], Field(min_length=1, max_length=16)]
    low_band_off: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=100_000)]
    base_trained: bool
    base_sha256: Digest
    tensors_sha256: Digest


@dataclass(frozen=True, slots=True)
class Elastic:
    """An elastic model's header and the file with its chains and norms, open."""

    header: Header
    tensors: Checkpoint

    def linears(
        self, base: Checkpoint, linears: Sequence[Linear], block: int, dtype: torch.dtype
    ) -> dict[str, ElasticLinear]:
        """A block's `linears`, by their names below it. Raises ProblemError `model_file_corrupt` for impossible norms."""
        low_band = block not in self.header.low_band_off
        found = {}
        for linear in linears:
            weight = turned(linear, base.read(linear.name, dtype))
            found[linear.module] = made = _linear(self.tensors, linear, weight, low_band=low_band)
            if not bool((made.norms.isfinite() & (made.norms >= 0)).all()):
                _corrupt(f"the norms of '{linear.name}' are not finite numbers from zero on")
        return found


def tensors_of(made: Linears, linears: Sequence[Linear]) -> dict[str, Tensor]:
    """All tensors of a block's linears, by their names in the shard of a block."""
    tensors: dict[str, Tensor] = {}
    for linear in linears:
        each, stem = made[linear.module], linear.name.removesuffix(".weight")
        tensors[linear.name] = turned(linear, each.weight)
        tensors |= {f"{stem}.{UP}": each.chain.up, f"{stem}.{DOWN}": each.chain.down, f"{stem}.{NORMS}": each.norms}
    return tensors


def linears_in(
    shard: Checkpoint, linears: Sequence[Linear], device: torch.device, *, low_band: bool
) -> dict[str, ElasticLinear]:
    """What `tensors_of` made tensors of."""
    return {
        linear.module: _linear(shard, linear, turned(linear, shard.read(linear.name, device=device)), low_band=low_band)
        for linear in linears
    }


def _linear(tensors: Checkpoint, linear: Linear, weight: Tensor, *, low_band: bool) -> ElasticLinear:
    stem, device = linear.name.removesuffix(".weight"), weight.device
    up, down, norms = (tensors.read(f"{stem}.{part}", device=device) for part in (UP, DOWN, NORMS))
    return ElasticLinear(weight, norms.float(), Chain(up, down), low_band)


def write_base(source: Checkpoint, family: Family, blocks: Sequence[Sequence[Linear]], attempt: Attempt) -> list[Path]:
    """Write the base's blocks: the linears as they were trained, the rest as it came, cast. Returns their shards."""
    shards = []
    for index, linears in enumerate(blocks):
        prefix, shard = f"{family.block(index)}.", attempt.folder / f"base-{index:05d}.safetensors"
        with attempt.written(index) as written:
            tensors = {linear.name: written.read(linear.name) for linear in linears}
            dtype = next(iter(tensors.values())).dtype
            others = (name for name in source.headers.tensors if name.startswith(prefix) and name not in tensors)
            write_shard(shard, tensors | {name: source.read(name, dtype) for name in others})
        shards.append(shard)
    return shards


def is_elastic(name: str) -> bool:
    """Whether a tensor of this name is of the chains and norms, and not of the base."""
    return name.endswith((f".{UP}", f".{DOWN}", f".{NORMS}"))


def write_header(base: Checkpoint, bands: Sequence[Band], low_band_off: Iterable[int], *, base_trained: bool) -> None:
    """Write `elastic.json` beside the base, when all it speaks of is there."""
    header = Header(
        bands=list(bands),
        low_band_off=sorted(low_band_off),
        base_trained=base_trained,
        base_sha256=base.sha256,
        tensors_sha256=sha256_of(base.folder / TENSORS),
    )
    (base.folder / HEADER).write_text(header.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_elastic(base: Checkpoint, blocks: Sequence[Sequence[Linear]]) -> Elastic:
    """The elastic model in the folder of `base`, whose linears `blocks` has. To be closed by closing its `tensors`.

    Raises ProblemError `model_not_elastic` if the folder has no header, `model_file_corrupt` if anything does not fit.
    """
    if not (base.folder / HEADER).is_file():
        raise ProblemError(
            "model_not_elastic",
            f"The model has no {HEADER}.",
            hint="Only what a job of kind 'elastic' made can be materialised.",
        )
    header = _read_header(base.folder / HEADER)
    file = base.folder / TENSORS
    if not file.is_file() or sha256_of(file) != header.tensors_sha256:
        _corrupt(f"{TENSORS} is missing or not the file that {HEADER} names")
    if base.sha256 != header.base_sha256:
        _corrupt(f"the base's files are not those that {HEADER} names")
    tensors = open_shard(file)
    _check_tensors(tensors.headers, blocks, widths(header.bands)[-1])
    return Elastic(header, tensors)


def _read_header(path: Path) -> Header:
    refuse_above(MAX_CONFIG_BYTES, path.stat().st_size, HEADER, "model_file_corrupt")
    document = parse_object(path.read_bytes(), HEADER, "model_file_corrupt")
    try:
        return Header.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = "/".join(str(part) for part in first["loc"])
        _corrupt(f"{HEADER} is not valid at '{where[:100]}': {first['msg']}")


def _check_tensors(found: ModelHeaders, blocks: Sequence[Sequence[Linear]], ranks: int) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for linear in chain.from_iterable(blocks):
        stem = linear.name.removesuffix(".weight")
        expected |= {f"{stem}.{UP}": (linear.out_features, ranks), f"{stem}.{DOWN}": (ranks, linear.in_features)}
        expected[f"{stem}.{NORMS}"] = (linear.in_features,)
    if expected != {name: tensor.shape for name, tensor in found.tensors.items()}:
        _corrupt(f"{TENSORS} does not hold exactly the tensors that the base's linears and the bands' ranks ask for")
    if any(tensor.dtype not in FLOATS for tensor in found.tensors.values()):
        _corrupt(f"{TENSORS} holds tensors that are no floats")


def _corrupt(what: str) -> NoReturn:
    raise ProblemError("model_file_corrupt", f"The elastic model cannot be read: {what}.", hint="Fetch it or make it again.")
