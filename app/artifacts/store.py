"""Where the bytes of artifacts lie: content-addressed, under `tenant/sha256`.

`local.py` keeps them in a folder, `s3.py` in a bucket. Both verify a file's digest while they write it, and a blob is there
as a whole or not at all.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

from secateur.problems import ProblemError

CHUNK_BYTES = 1 << 20

_TENANT = re.compile(r"[A-Za-z0-9][\w\-]{0,63}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes that are in a store: whose, what, how many, since when."""

    tenant_id: str
    sha256: str
    size: int
    modified_at: datetime


class Store(ABC):
    """What a store can do. Everything that goes wrong is a `ProblemError`: `service_unavailable` or `disk_full`.

    A store is closed by `close()`, or by the end of an `async with` block.
    """

    @abstractmethod
    async def put_file(self, tenant_id: str, sha256: str, path: Path) -> None:
        """Keep the file at `path`; nothing is done if the blob is there already.

        Raises `verification_failed` if the file is not an ordinary one or its digest is not `sha256`.
        """

    @abstractmethod
    def read(self, tenant_id: str, sha256: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """The bytes `start <= i < end` in pieces, to the blob's last one if `end` is None.

        Raises `service_unavailable`, at the first piece, if the blob is not there.
        """

    async def link(self, tenant_id: str, sha256: str, path: Path) -> bool:
        """Make `path` a second name of the blob, which nobody may write to; False where that cannot be done."""
        del tenant_id, sha256, path
        return False

    @abstractmethod
    async def exists(self, tenant_id: str, sha256: str) -> bool:
        """Whether the blob is there."""

    @abstractmethod
    async def delete(self, tenant_id: str, sha256: str) -> None:
        """Remove the blob; nothing is done if it is not there."""

    @abstractmethod
    def blobs(self) -> AsyncIterator[Blob]:
        """All blobs, in no order. What comes or goes meanwhile may be missed."""

    @abstractmethod
    async def drop_unfinished(self, before: datetime) -> int:
        """Remove what is left of uploads that were begun, and not continued, since `before`; how many there were."""

    @abstractmethod
    async def check(self) -> None:
        """For readiness: raises `service_unavailable` if the store cannot be used."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of connections."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def open_store(url: str, *, endpoint: str | None = None) -> Store:
    """The store of a `file:///folder` or `s3://bucket/prefix` URL; `endpoint` is that of an S3 that is not AWS.

    Raises ValueError for any other URL, and for S3 if its package is not installed: both are mistakes of the operator.
    """
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.netloc in {"", "localhost"} and parts.path.startswith("/"):
        from app.artifacts.local import LocalStore  # noqa: PLC0415 (each store is loaded when it is used)

        return LocalStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        from app.artifacts.s3 import S3Store  # noqa: PLC0415 (as above, and boto3 is an extra)

        return S3Store(parts.netloc, prefix=parts.path.strip("/"), endpoint=endpoint)
    raise ValueError(f"SECATEUR_STORE_URL is 'file:///folder' or 's3://bucket/prefix', not {url!r}")


def checked(tenant_id: str, sha256: str) -> tuple[str, str]:
    """The two as they are. Raises `verification_failed` if they could name anything but a tenant's own blob."""
    if not _TENANT.fullmatch(tenant_id):
        raise ProblemError("verification_failed", f"{tenant_id!r} is not the id of a tenant")
    if not _SHA256.fullmatch(sha256):
        raise ProblemError("verification_failed", f"{sha256!r} is not a SHA-256 digest in lower-case hexadecimal")
    return tenant_id, sha256


def is_blob(tenant_id: str, sha256: str) -> bool:
    """Whether these could be the two parts of a blob's name: an operator's own files in the same place are not."""
    return bool(_TENANT.fullmatch(tenant_id) and _SHA256.fullmatch(sha256))


def wrong_digest(path: Path, *, wanted: str, found: str) -> ProblemError:
    """The problem of a file that is not what its digest says."""
    return ProblemError("verification_failed", f"{path.name} has the SHA-256 digest {found}, not {wanted}: it has changed")


def missing(sha256: str) -> ProblemError:
    """The problem of a blob that should be there."""
    return ProblemError("service_unavailable", f"the bytes of artifact {sha256} are not in the store")
