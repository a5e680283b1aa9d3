"""What an attempt leaves for the next one: the blocks it finished, and the activations between two blocks.

A finished block is a shard and a record with its digest and facts; the record is written last, so a block that has one is
whole. The activations only save time: from any block before them they can be computed again with the finished shards.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from secateur.problems import ProblemError
from secateur.pruning.checkpoint import Checkpoint, link, open_shard, sha256_of, write_shard
from secateur.pruning.facts import BlockFacts

FINGERPRINT = "fingerprint.json"
BOUNDARY = "boundary.json"
SCORES = "scores.json"  # of blocks, by which targets are allocated
SAVE_SHARE = 0.02  # of the run's time at most is spent on saving activations


@dataclass(frozen=True, slots=True)
class _Finished:
    sha256: str
    facts: BlockFacts


@dataclass(frozen=True, slots=True)
class _Boundary:
    """The activations before `block` are in `file`."""

    block: int
    file: str
    sha256: str


_FINISHED, _BOUNDARY, _SCORES = TypeAdapter(_Finished), TypeAdapter(_Boundary), TypeAdapter(list[float])


class Attempt:
    """The folder of an attempt. `fingerprint`: all that its blocks depend on; work of another is not taken over."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder, self._fingerprint = folder, json.dumps(fingerprint, sort_keys=True)
        self.finished: list[BlockFacts] = []
        self._saved, self._cost = time.monotonic(), 0.0
        _write_whole(folder / FINGERPRINT, self._fingerprint)

    def shard(self, index: int) -> Path:
        """Where a block's tensors are or will be."""
        return self.folder / f"block-{index:05d}.safetensors"

    @property
    def outside(self) -> Path:
        """Where the tensors outside the blocks are or will be."""
        return self.folder / "outside-blocks.safetensors"

    def finish(self, facts: BlockFacts) -> None:
        """Record that the next block is done and its shard written."""
        done = _Finished(sha256_of(self.shard(facts.block)), facts)
        _write_whole(_record(self.shard(facts.block)), _FINISHED.dump_json(done).decode())
        self.finished.append(facts)

    def take_over(self, earlier: Iterable[Path]) -> None:
        """Link in what the most advanced of the folders `earlier` finished; what is damaged or of another job is not.

        An attempt that was given up may be at work for a while yet, and remove what it made under this one's hands: what was
        linked until then stays taken over.
        """
        best, source = self.finished, self.folder
        for folder in earlier:
            if _text(folder / FINGERPRINT) == self._fingerprint and len(found := _finished(folder)) > len(best):
                best, source = found, folder
        if source == self.folder:
            return
        with suppress(FileNotFoundError):  # first: by other scores the blocks that are taken over would have other targets
            link(source / SCORES, self.folder / SCORES)
        with suppress(FileNotFoundError):
            for facts in best:
                shard = self.shard(facts.block)
                link(source / shard.name, shard)
                link(_record(source / shard.name), _record(shard))
                self.finished.append(facts)
        if boundary := _read_boundary(source):
            with suppress(FileNotFoundError):
                link(source / boundary.file, self.folder / boundary.file)
                link(source / BOUNDARY, self.folder / BOUNDARY)

    def scores(self, look: Callable[[], list[float]]) -> list[float]:
        """What `look` returns; it is asked only if neither this attempt nor the one that was taken over has."""
        file = self.folder / SCORES
        try:
            return _SCORES.validate_json(_text(file))
        except ValidationError:
            found = look()
        _write_whole(file, json.dumps(found))
        return found

    def written(self, index: int) -> Checkpoint:
        """A finished block's tensors."""
        return open_shard(self.shard(index))

    def save(self, block: int, hidden: list[Tensor]) -> None:
        """Keep the activations before `block`, each (batch, seq, hidden), in place of older ones, unless it is too soon."""
        began = time.monotonic()
        if (began - self._saved) * SAVE_SHARE < self._cost:
            return
        file = self.folder / f"boundary-{block:05d}.safetensors"
        write_shard(file, {f"{number:06d}": part for number, part in enumerate(hidden)})
        boundary = _Boundary(block, file.name, sha256_of(file))
        _write_whole(self.folder / BOUNDARY, _BOUNDARY.dump_json(boundary).decode())
        for older in self.folder.glob("boundary-*.safetensors"):
            if older != file:
                older.unlink()
        self._saved = time.monotonic()
        self._cost = self._saved - began

    def restore(self, hidden: list[Tensor]) -> tuple[int, list[Tensor]]:
        """The block that saved activations are before, and them; 0 and `hidden` if there are none of the same shapes."""
        boundary = _read_boundary(self.folder)
        if boundary is None or boundary.block > len(self.finished):
            return 0, hidden
        file = self.folder / boundary.file
        try:
            if sha256_of(file) != boundary.sha256:
                return 0, hidden
            with open_shard(file) as saved:
                parts = [saved.read(name, device=hidden[0].device) for name in sorted(saved.headers.tensors)]
        except (OSError, ProblemError):
            return 0, hidden
        alike = [(part.shape, part.dtype) for part in parts] == [(part.shape, part.dtype) for part in hidden]
        return (boundary.block, parts) if alike else (0, hidden)


def _finished(folder: Path) -> list[BlockFacts]:
    """The finished blocks of a folder, from the first on, up to one that is missing or damaged."""
    found: list[BlockFacts] = []
    while True:
        shard = folder / f"block-{len(found):05d}.safetensors"
        try:
            record = _FINISHED.validate_json(_text(_record(shard)))
            if record.facts.block != len(found) or sha256_of(shard) != record.sha256:
                return found
        except (ValidationError, OSError):
            return found
        found.append(record.facts)


def _read_boundary(folder: Path) -> _Boundary | None:
    try:
        return _BOUNDARY.validate_json(_text(folder / BOUNDARY))
    except ValidationError:
        return None


def _record(shard: Path) -> Path:
    return shard.with_suffix(".json")


def _text(file: Path) -> str:
    """A file's text, empty for one that is not there or no text."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
