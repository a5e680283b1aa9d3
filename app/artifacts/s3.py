"""Artifacts in a bucket that speaks S3: `<prefix>/<tenant>/<sha256>`.

Credentials and region are those of the environment, as every AWS tool finds them. boto3 blocks, so it works in threads.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from app.artifacts.local import open_ordinary
from app.artifacts.store import CHUNK_BYTES, Blob, Store, checked, is_blob, missing, wrong_digest
from secateur.problems import ProblemError

try:
    import boto3
    from boto3.exceptions import Boto3Error
    from boto3.s3.transfer import TransferConfig
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError
except ImportError as error:
    raise ValueError("an s3:// store needs boto3: install secateur[s3]") from error

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import GetObjectOutputTypeDef

PART_BYTES = 16 << 20
_NOT_FOUND = frozenset({"404", "NoSuchKey", "NotFound"})


class S3Store(Store):
    """A store in one bucket, below a prefix."""

    def __init__(self, bucket: str, *, prefix: str = "", endpoint: str | None = None) -> None:
        self.bucket = bucket
        self.prefix = prefix
        self._client = boto3.client("s3", endpoint_url=endpoint, config=_config(path_style=endpoint is not None))

    async def put_file(self, tenant_id: str, sha256: str, path: Path) -> None:
        if not await self.exists(tenant_id, sha256):
            await asyncio.to_thread(self._put, self._key(tenant_id, sha256), sha256, path)

    async def read(self, tenant_id: str, sha256: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        if end is not None and end <= start:
            return
        with _as_problems(sha256):
            answer = await asyncio.to_thread(self._get, self._key(tenant_id, sha256), start, end)
            body = answer["Body"]
            try:
                while piece := await asyncio.to_thread(body.read, CHUNK_BYTES):
                    yield piece
            finally:
                body.close()

    async def exists(self, tenant_id: str, sha256: str) -> bool:
        return await asyncio.to_thread(self._exists, self._key(tenant_id, sha256))

    async def delete(self, tenant_id: str, sha256: str) -> None:
        with _as_problems(sha256):
            key = self._key(tenant_id, sha256)
            await asyncio.to_thread(self._client.delete_object, Bucket=self.bucket, Key=key)

    async def blobs(self) -> AsyncIterator[Blob]:
        with _as_problems():
            pages = iter(self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._folder))
            while page := await asyncio.to_thread(next, pages, None):
                for entry in page.get("Contents", []):
                    parts = entry["Key"].removeprefix(self._folder).split("/")
                    if len(parts) == 2 and is_blob(parts[0], parts[1]):
                        yield Blob(parts[0], parts[1], entry["Size"], entry["LastModified"].astimezone(UTC))

    async def drop_unfinished(self, before: datetime) -> int:
        with _as_problems():
            return await asyncio.to_thread(self._drop_unfinished, before)

    async def check(self) -> None:
        with _as_problems():
            await asyncio.to_thread(self._client.head_bucket, Bucket=self.bucket)

    async def close(self) -> None:
        await asyncio.to_thread(self._client.close)

    @property
    def _folder(self) -> str:
        return f"{self.prefix}/" if self.prefix else ""

    def _drop_unfinished(self, before: datetime) -> int:
        pages = self._client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket, Prefix=self._folder)
        old: list[tuple[str, str]] = []
        dropped = 0
        with _unless_gone():  # some servers say so of a bucket that never had one
            for page in pages:
                uploads = (upload for upload in page.get("Uploads", []) if upload["Initiated"] < before)
                old += [(upload["Key"], upload["UploadId"]) for upload in uploads]
        for key, upload_id in old:
            with _unless_gone():
                self._client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload_id)
                dropped += 1
        return dropped

    def _key(self, tenant_id: str, sha256: str) -> str:
        return "/".join(filter(None, (self.prefix, *checked(tenant_id, sha256))))

    def _get(self, key: str, start: int, end: int | None) -> GetObjectOutputTypeDef:
        if (start, end) == (0, None):  # an empty object has no range that could be asked for
            return self._client.get_object(Bucket=self.bucket, Key=key)
        return self._client.get_object(Bucket=self.bucket, Key=key, Range=f"bytes={start}-{'' if end is None else end - 1}")

    def _exists(self, key: str) -> bool:
        with _as_problems():
            try:
                self._client.head_object(Bucket=self.bucket, Key=key)
            except ClientError as error:
                if error.response.get("Error", {}).get("Code") in _NOT_FOUND:
                    return False
                raise
        return True

    def _put(self, key: str, sha256: str, path: Path) -> None:
        with _as_problems(), _Verifying(path, sha256) as source:
            self._client.upload_fileobj(
                source,
                self.bucket,
                key,
                ExtraArgs={"ContentType": "application/octet-stream"},
                Config=TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4),
            )


class _Verifying(io.FileIO):
    """A file to be uploaded that is read once, from the front, and hashed on the way.

    Its last bytes are handed over only if the digest is right, so that of a wrong file no upload is ever completed.
    """

    def __init__(self, path: Path, sha256: str) -> None:
        super().__init__(open_ordinary(path))
        self._path = path
        self._wanted = sha256
        self._digest = hashlib.sha256()
        self._remaining = os.fstat(self.fileno()).st_size

    def seekable(self) -> bool:
        return False  # or the parts would be read side by side

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = self._remaining if size is None or size < 0 else min(size, self._remaining)
        pieces = []
        while wanted > 0 and (piece := super().read(wanted)):
            pieces.append(piece)
            wanted -= len(piece)
        data = b"".join(pieces)
        self._digest.update(data)
        self._remaining -= len(data)
        if wanted > 0 or (self._remaining == 0 and self._digest.hexdigest() != self._wanted):
            raise wrong_digest(self._path, wanted=self._wanted, found=self._digest.hexdigest())
        return data


def _config(*, path_style: bool) -> Config:
    return Config(
        connect_timeout=5,
        read_timeout=60,
        retries={"mode": "standard", "max_attempts": 3},
        # Some servers send the whole object's checksum with a part of it. Our own digests check what is read.
        response_checksum_validation="when_required",
        s3={"addressing_style": "path" if path_style else "auto"},
    )


@contextmanager
def _unless_gone() -> Iterator[None]:
    """Passes over an upload in pieces that was completed or broken off meanwhile."""
    try:
        yield
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") != "NoSuchUpload":
            raise


@contextmanager
def _as_problems(sha256: str | None = None) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "an error")
        if sha256 and code in _NOT_FOUND:
            raise missing(sha256) from error
        raise ProblemError("service_unavailable", f"the artifact store answered {code}") from error
    except (BotoCoreError, Boto3Error, OSError) as error:
        raise ProblemError("service_unavailable", f"the artifact store does not answer: {type(error).__name__}") from error
