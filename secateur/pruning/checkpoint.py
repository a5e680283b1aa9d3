"""Safetensors in and out, tensor by tensor: no more of a model is held than is asked for."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch import Tensor

from secateur.problems import ProblemError
from secateur.pruning.families import EXACT
from secateur.pruning.headers import CONFIG, ELEMENT_BYTES, FLOATS, INDEX, SINGLE, ModelHeaders, read_header
from secateur.pruning.headers import Tensor as Header

DTYPES: Mapping[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FORMAT_NAMES: Mapping[torch.dtype, str] = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
_OF_FORMAT = {name: dtype for dtype, name in FORMAT_NAMES.items()}
COPY_BYTES = 16 << 20
# One file is the simplest download there is; beyond this size a file per block is easier to resume.
SINGLE_FILE_BYTES = 2 << 30


class Checkpoint:
    """The weights in a model folder. A context manager: leaving it closes the files.

    Files are read and not mapped: mapped pages count as this process's memory for as long as the file is open, and a file
    that is cut short under a mapping kills the process where a read can say so.
    """

    def __init__(self, folder: Path, headers: ModelHeaders) -> None:
        self.folder, self.headers = folder, headers
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    @cached_property
    def sha256(self) -> str:
        """One digest for the model: over config.json and the weight files, in order."""
        whole = hashlib.sha256()
        for name in (CONFIG, *self.headers.files):
            whole.update(bytes.fromhex(sha256_of(self.folder / name)))
        return whole.hexdigest()

    def __contains__(self, name: str) -> bool:
        return name in self.headers.tensors

    def read(self, name: str, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """A tensor by name, cast to `dtype` if it `is_cast`. Raises ProblemError `model_file_corrupt` if the file was cut
        short."""
        header = self.headers.tensors[name]
        if not header.file:
            return torch.zeros(header.shape, dtype=dtype or _OF_FORMAT[header.dtype], device=device)
        to_gpu = device is not None and device.type == "cuda"
        raw = torch.empty(header.end - header.start, dtype=torch.uint8, pin_memory=to_gpu)
        file = self._open(header.file)
        file.seek(header.start)
        unread = raw.numpy().data
        while unread:
            count = file.readinto(unread)  # type: ignore[attr-defined]  # an unbuffered file has it; BinaryIO does not say so
            if not count:
                raise ProblemError("model_file_corrupt", f"{header.file} was cut short while it was read.")
            unread = unread[count:]
        tensor = raw.view(_OF_FORMAT[header.dtype]).view(header.shape)
        if to_gpu:
            tensor = tensor.to(device, non_blocking=True)
        return tensor.to(device=device, dtype=dtype if is_cast(name, header) else None)

    def prefetch(self, names: Iterable[str]) -> None:
        """Ask the system to read these tensors ahead, where it takes such advice."""
        if sys.platform == "linux":
            for header in (header for header in map(self.headers.tensors.__getitem__, names) if header.file):
                file = self._open(header.file)
                os.posix_fadvise(file.fileno(), header.start, header.end - header.start, os.POSIX_FADV_WILLNEED)

    def _open(self, name: str) -> BinaryIO:
        if name not in self._files:
            self._files[name] = (self.folder / name).open("rb", buffering=0)
        return self._files[name]


def is_cast(name: str, tensor: Header) -> bool:
    """Whether a tensor takes the dtype that is asked for: floats do, but for the few that must stay exact."""
    return tensor.dtype in FLOATS and not name.endswith(EXACT)


def open_shard(path: Path) -> Checkpoint:
    """A single safetensors file as a checkpoint without a config."""
    return Checkpoint(path.parent, ModelHeaders("safetensors", {}, read_header(path)))


def sha256_of(path: Path) -> str:
    """A file's digest, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link(existing: Path, new: Path) -> None:
    """The same file under a second name; a copy where the file system has no hard links."""
    try:
        new.hardlink_to(existing)
    except OSError:
        shutil.copyfile(existing, new)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor on its way into a file: what the header says of it, and its bytes."""

    dtype: str
    shape: tuple[int, ...]
    length: int
    chunks: Callable[[], Iterable[bytes | memoryview]]


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, atomically: it is there whole or not at all. The same tensors give the same bytes.

    It outlives the process at once, and the machine's power when the system has written it out; whoever trusts it later
    checks its digest.
    """
    _write(path, {name: _entry_of(tensor) for name, tensor in tensors.items()}, durable=False)


def gather(shards: list[Path], into: Path) -> None:
    """Make of `shards` an ordinary checkpoint in the folder `into`: one file, or an index and the shards, numbered.

    The shards stay where they are, and what is made of them is on the disk when this returns.
    """
    headers = {shard: read_header(shard) for shard in shards}
    total = sum(tensor.end - tensor.start for found in headers.values() for tensor in found.values())
    if total <= SINGLE_FILE_BYTES:
        merge(shards, into / SINGLE)
        return
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        link(shard, into / file)
        _sync(into / file)
        places |= dict.fromkeys(headers[shard], file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (into / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def merge(shards: list[Path], into: Path, wanted: Callable[[str], bool] = lambda _: True) -> None:
    """Make one file of those tensors of `shards` whose names are `wanted`. It is on the disk when this returns."""
    entries = {
        name: _Entry(tensor.dtype, tensor.shape, tensor.end - tensor.start, partial(_slice, shard, tensor.start, tensor.end))
        for shard in shards
        for name, tensor in read_header(shard).items()
        if wanted(name)
    }
    _write(into, entries, durable=True)


def _entry_of(tensor: Tensor) -> _Entry:
    def chunks() -> Iterator[memoryview]:
        yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data

    return _Entry(FORMAT_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes, chunks)


def _slice(path: Path, start: int, end: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        file.seek(start)
        for position in range(start, end, COPY_BYTES):
            yield file.read(min(COPY_BYTES, end - position))


def _write(path: Path, entries: Mapping[str, _Entry], *, durable: bool) -> None:
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
    if durable:
        _sync(partial_path)
    partial_path.rename(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
