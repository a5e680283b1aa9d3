"""Downloads that resume: each file comes into a `.part` beside it, is checked, and takes its name when it is whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from secateur._calls import get_job
from secateur._http import TRIES, Call, Pause, Reply, Request, Work, failure, is_good, is_transient, pause_after
from secateur.errors import CorruptDownloadError, JobNotSucceededError, SecateurError, UnreachableError
from secateur.schemas.artifacts import Artifact
from secateur.schemas.jobs import Status

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """How far a download is: bytes of all its files, those that were there already included."""

    file: str
    done: int
    total: int


OnProgress = Callable[[DownloadProgress], None]


def download(
    job_id: str, into: Path | str, *, files: Collection[str] | None = None, on_progress: OnProgress | None = None
) -> Call[Path]:
    """Bring the files of a job that succeeded (or only those named in `files`) into a folder, and return the folder.

    A file that is there whole is left alone, one that was begun is continued, and each is checked against its SHA-256.
    `on_progress` is called as bytes arrive, from whichever thread writes them.
    Raises JobNotSucceededError, CorruptDownloadError, OSError for the folder, and what every call raises.
    """
    job = yield from get_job(job_id)
    if job.status != Status.SUCCEEDED:
        raise JobNotSucceededError(f"Job {job_id} is {job.status}; only a job that succeeded has files.")
    artifacts = [one for one in job.artifacts if files is None or one.name in files]
    if absent := set(files or ()) - {one.name for one in artifacts}:
        raise SecateurError(f"Job {job_id} has no file '{min(absent)}'.")
    meter = _Meter(sum(one.size for one in artifacts), on_progress)
    for artifact in artifacts:
        yield from _bring(artifact, _inside(Path(into), artifact.name), meter)
    return Path(into)


def _bring(artifact: Artifact, path: Path, meter: _Meter) -> Call[None]:
    if (yield Work(partial(_is_whole, path, artifact))):
        meter.settle(artifact)
        return
    part = _Part(path.with_name(f"{path.name}.part"), artifact, meter)
    try:
        resumed = yield Work(part.open)
        yield from _fill(part)
        if resumed and not part.is_right:  # what was there may be of another file: once more, from the beginning
            yield Work(part.restart)
            yield from _fill(part)
        yield Work(partial(part.finish, path))
    finally:
        part.close()
    meter.settle(artifact)


def _fill(part: _Part) -> Call[None]:
    """Ask for what is missing until nothing is; a try that brought bytes does not count as a failed one."""
    tries = 0
    while part.missing():
        before = part.size
        outcome: Reply | UnreachableError = yield part.request()
        if not part.missing():
            return
        if isinstance(outcome, Reply) and outcome.status == 416:
            yield Work(part.restart)
        elif not is_transient(outcome) and not is_good(outcome):
            raise failure(outcome)
        tries = 0 if part.size > before else tries + 1
        if tries == TRIES:
            raise failure(outcome)
        yield Pause(pause_after(tries + 1, outcome))


@dataclass
class _Meter:
    """Counts the bytes of all files together."""

    total: int
    on_progress: OnProgress | None
    settled: int = 0

    def show(self, artifact: Artifact, size: int) -> None:
        if self.on_progress is not None:
            self.on_progress(DownloadProgress(artifact.name, self.settled + size, self.total))

    def settle(self, artifact: Artifact) -> None:
        self.settled += artifact.size
        self.show(artifact, 0)


@dataclass
class _Part:
    """The beginning of a file, as much as has arrived, and its digest."""

    path: Path
    artifact: Artifact
    meter: _Meter
    size: int = 0
    _file: BinaryIO | None = None
    _digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def open(self) -> bool:
        """Open what an earlier download left; whether it left anything."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        self._file.seek(0)
        while piece := self._file.read(_PIECE_BYTES):
            self._digest.update(piece)
            self.size += len(piece)
        if self.size > self.artifact.size:
            self.restart()
        return self.size > 0

    def restart(self) -> None:
        self._opened.truncate(0)
        self._digest, self.size = hashlib.sha256(), 0

    def request(self) -> Request:
        """The request for what is missing: if the file has changed meanwhile, the whole of it is answered."""
        headers = {"Accept-Encoding": "identity"}
        if self.size:
            headers |= {"Range": f"bytes={self.size}-", "If-Range": f'"{self.artifact.sha256}"'}
        return Request("GET", f"/v1/artifacts/{self.artifact.id}/content", headers=headers, into=self._begin)

    def _begin(self, head: Reply) -> Callable[[bytes], None]:
        if head.status != 206 or not head.headers.get("content-range", "").startswith(f"bytes {self.size}-"):
            self.restart()
        return self._write

    def _write(self, piece: bytes) -> None:
        if self.size + len(piece) > self.artifact.size:
            raise CorruptDownloadError(
                f"The service sends more of {self.artifact.name} than its {self.artifact.size} bytes."
            )
        self._opened.write(piece)
        self._digest.update(piece)
        self.size += len(piece)
        self.meter.show(self.artifact, self.size)

    def missing(self) -> bool:
        return self.size < self.artifact.size

    @property
    def is_right(self) -> bool:
        return self.size == self.artifact.size and self._digest.hexdigest() == self.artifact.sha256

    def finish(self, path: Path) -> None:
        """Give the file its name. Raises CorruptDownloadError, and removes it, if its digest is not the right one."""
        if not self.is_right:
            self.path.unlink()
            raise CorruptDownloadError(f"{self.artifact.name} arrived with another digest than its job recorded; try again.")
        self._opened.flush()
        os.fsync(self._opened.fileno())
        self.path.replace(path)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    @property
    def _opened(self) -> BinaryIO:
        if self._file is None:
            raise ValueError("the part was not opened")
        return self._file


def _is_whole(path: Path, artifact: Artifact) -> bool:
    if not path.is_file() or path.stat().st_size != artifact.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == artifact.sha256


def _inside(folder: Path, name: str) -> Path:
    """`folder / name`, if the name, which a server chose, stays inside the folder."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
        raise SecateurError(f"The service named a file {name!r}, which would lie outside the folder.")
    return folder.joinpath(*parts)
