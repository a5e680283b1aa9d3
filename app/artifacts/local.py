"""Artifacts in a folder: `<folder>/<tenant>/<first two digits>/<sha256>`."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from app.artifacts.store import CHUNK_BYTES, Blob, Store, checked, is_blob, missing, wrong_digest
from secateur.problems import ProblemError

_INCOMING = ".incoming-"


class LocalStore(Store):
    """A store in one folder of one file system.

    Files that come in are copied, never hard-linked: a link would share its bytes with a file in the folder of an attempt,
    which a process that outlived its lease may still hold open for writing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def put_file(self, tenant_id: str, sha256: str, path: Path) -> None:
        await asyncio.to_thread(self._put, self._blob(tenant_id, sha256), sha256, path)

    async def read(self, tenant_id: str, sha256: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        with _as_problems():
            try:
                blob = await asyncio.to_thread(self._blob(tenant_id, sha256).open, "rb")
            except FileNotFoundError:
                raise missing(sha256) from None
            with blob:
                blob.seek(start)
                remaining = (os.fstat(blob.fileno()).st_size if end is None else end) - start
                while remaining > 0 and (piece := await asyncio.to_thread(blob.read, min(CHUNK_BYTES, remaining))):
                    remaining -= len(piece)
                    yield piece

    async def link(self, tenant_id: str, sha256: str, path: Path) -> bool:
        try:
            await asyncio.to_thread(path.hardlink_to, self._blob(tenant_id, sha256))
        except OSError:  # another file system, one without links, or no such blob: reading tells
            return False
        return True

    async def exists(self, tenant_id: str, sha256: str) -> bool:
        return await asyncio.to_thread(self._blob(tenant_id, sha256).is_file)

    async def delete(self, tenant_id: str, sha256: str) -> None:
        with _as_problems():
            await asyncio.to_thread(self._blob(tenant_id, sha256).unlink, missing_ok=True)

    async def blobs(self) -> AsyncIterator[Blob]:
        with _as_problems():
            for shelf in await asyncio.to_thread(lambda: sorted(self.folder.glob("*/[0-9a-f][0-9a-f]"))):
                for blob in await asyncio.to_thread(_blobs_on, shelf):
                    yield blob

    async def drop_unfinished(self, before: datetime) -> int:
        with _as_problems():
            return await asyncio.to_thread(self._drop_unfinished, before)

    async def check(self) -> None:
        with _as_problems():
            await asyncio.to_thread(self.folder.mkdir, parents=True, exist_ok=True)
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise ProblemError("service_unavailable", "the artifact store's folder cannot be written to")

    async def close(self) -> None:
        """Nothing is held open between two calls."""

    def _blob(self, tenant_id: str, sha256: str) -> Path:
        tenant_id, sha256 = checked(tenant_id, sha256)
        return self.folder / tenant_id / sha256[:2] / sha256

    def _drop_unfinished(self, before: datetime) -> int:
        dropped = 0
        for file in self.folder.glob(f"*/[0-9a-f][0-9a-f]/{_INCOMING}*"):
            with suppress(FileNotFoundError):
                if file.stat().st_mtime < before.timestamp():
                    file.unlink()
                    dropped += 1
        return dropped

    def _put(self, blob: Path, sha256: str, path: Path) -> None:
        with _as_problems():
            if blob.is_file():
                return
            blob.parent.mkdir(parents=True, exist_ok=True)
            with open(open_ordinary(path), "rb", buffering=0) as source, _replacing(blob) as target:
                found = _copy(source, target)
                if found != sha256:
                    raise wrong_digest(path, wanted=sha256, found=found)


def _blobs_on(shelf: Path) -> list[Blob]:
    found = []
    for entry in os.scandir(shelf):
        with suppress(FileNotFoundError):
            if is_blob(shelf.parent.name, entry.name) and entry.is_file(follow_symlinks=False):
                facts = entry.stat(follow_symlinks=False)
                modified_at = datetime.fromtimestamp(facts.st_mtime, UTC)
                found.append(Blob(shelf.parent.name, entry.name, facts.st_size, modified_at))
    return found


def open_ordinary(path: Path) -> int:
    """A descriptor of a file of the process that prunes, which handled a hostile model: no link to elsewhere, no pipe.

    Raises `verification_failed` for those, OSError as `os.open` does.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ProblemError("verification_failed", f"{path.name} is a symbolic link, not an ordinary file") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ProblemError("verification_failed", f"{path.name} is not an ordinary file")
    return descriptor


def _copy(source: BinaryIO, target: BinaryIO) -> str:
    digest = hashlib.sha256()
    while piece := source.read(CHUNK_BYTES):
        digest.update(piece)
        target.write(piece)
    return digest.hexdigest()


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that becomes it when the block ends well, and is on the disk by then."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=_INCOMING)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _as_problems() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise ProblemError(
                "disk_full", "the artifact store's disk is full", hint="Free some space, then retry."
            ) from error
        raise ProblemError("service_unavailable", f"the artifact store does not work: {error.strerror}") from error
