"""Safetensors in and out, tensor by tensor: no more of a model is held than is asked for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from secateur.pruning.headers import CONFIG, ELEMENT_BYTES, FLOATS, INDEX, SINGLE, ModelHeaders, read_header

DTYPES: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FORMAT_NAMES: Mapping[torch.dtype, str] = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
COPY_BYTES = 16 << 20
# One file is the simplest download there is; beyond this size a file per block is easier to resume.
SINGLE_FILE_BYTES = 2 << 30


class Checkpoint:
    """The weights in a model folder, memory-mapped. A context manager: leaving it closes the files."""

    def __init__(self, folder: Path, headers: ModelHeaders) -> None:
        self.folder, self.headers = folder, headers
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._stack.close()

    @cached_property
    def sha256(self) -> str:
        """One digest for the model: over config.json and the weight files, in order."""
        whole = hashlib.sha256()
        for name in (CONFIG, *self.headers.files):
            with (self.folder / name).open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()

    def __contains__(self, name: str) -> bool:
        return name in self.headers.tensors

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """A tensor by name, floats cast to `dtype`. Neither cast nor moved, it is the mapped file: never write to it."""
        header = self.headers.tensors[name]
        if header.file not in self._files:
            self._files[header.file] = self._stack.enter_context(safe_open(self.folder / header.file, framework="pt"))
        tensor: Tensor = self._files[header.file].get_tensor(name)
        return tensor.to(device=device, dtype=dtype if header.dtype in FLOATS else None)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor on its way into a file: what the header says of it, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    length: int
    chunks: Callable[[], Iterable[bytes | memoryview]]


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, atomically: it is there whole or not at all. The same tensors give the same bytes."""
    _write(path, {name: _entry_of(tensor) for name, tensor in tensors.items()})


def gather(shards: list[Path], into: Path) -> None:
    """Make of `shards` an ordinary checkpoint in the folder `into`: one file, or an index and the shards, numbered."""
    headers = {shard: read_header(shard) for shard in shards}
    total = sum(tensor.end - tensor.start for found in headers.values() for tensor in found.values())
    if total <= SINGLE_FILE_BYTES:
        entries = {
            name: _Entry(
                tensor.dtype, tensor.shape, tensor.end - tensor.start, partial(_slice, shard, tensor.start, tensor.end)
            )
            for shard, found in headers.items()
            for name, tensor in found.items()
        }
        _write(into / SINGLE, entries)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard.rename(into / file)
        places |= dict.fromkeys(headers[shard], file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (into / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _entry_of(tensor: Tensor) -> _Entry:
    def chunks() -> Iterator[memoryview]:
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data

    return _Entry(FORMAT_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, chunks)


def _slice(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        for position in range(start, end, COPY_BYTES):
            yield file.read(min(COPY_BYTES, end - position))


def _write(path: Path, entries: Mapping[str, _Entry]) -> None:
    """The safetensors format: the header's length, the header (widest elements first, so that all are aligned), the data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names = sorted(entries, key=lambda name: (-ELEMENT_BYTES[entries[name].dtype], name))
    position = 0
    for name in names:
        entry = entries[name]
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, position + entry.length],
        }
        position += entry.length
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    partial_path = path.with_name(f".{path.name}.partial")
    with partial_path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name in names:
            file.writelines(entries[name].chunks())
        file.flush()
        os.fsync(file.fileno())
    partial_path.rename(path)
