"""Both stores keep a blob whole or not at all, and give back exactly its bytes."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from app.artifacts import s3
from app.artifacts.local import LocalStore
from app.artifacts.store import Store, open_store
from secateur.problems import ProblemError
from tests.s3_server import KEY_ID, SECRET, serve_s3

TENANT = "tnt_0001"


@pytest.fixture(scope="module")
def s3_buckets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    folder = tmp_path_factory.mktemp("buckets")
    (folder / "artifacts").mkdir()
    with serve_s3(folder) as endpoint:
        yield folder, endpoint


@pytest.fixture(params=["local", "s3"])
async def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Store]:
    if request.param == "local":
        url, endpoint = (tmp_path / "store with space").as_uri(), None
    else:
        _, endpoint = request.getfixturevalue("s3_buckets")
        url = f"s3://artifacts/{request.node.callspec.id}-{tmp_path.name}"
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    async with open_store(url, endpoint=endpoint) as opened:
        await opened.check()
        yield opened


def _write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


async def _read(store: Store, sha256: str, start: int = 0, end: int | None = None, tenant: str = TENANT) -> bytes:
    return b"".join([piece async for piece in store.read(tenant, sha256, start, end)])


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
async def test_gives_back_what_was_put(store: Store, tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    sha256 = _write(tmp_path / "file", content)
    assert not await store.exists(TENANT, sha256)
    await store.put_file(TENANT, sha256, tmp_path / "file")
    assert await store.exists(TENANT, sha256)
    assert await _read(store, sha256) == content


async def test_reads_any_range(store: Store, tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    sha256 = _write(tmp_path / "file", content)
    await store.put_file(TENANT, sha256, tmp_path / "file")
    for start, end in [(0, 1), (0, 3_000_000), (1_048_575, 1_048_578), (2_999_999, 3_000_000), (500, 500), (7, None)]:
        assert await _read(store, sha256, start, end) == content[start:end]


async def test_a_blob_that_was_uploaded_in_parts_is_whole(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    content = os.urandom((10 << 20) + 17)
    sha256 = _write(tmp_path / "file", content)
    await store.put_file(TENANT, sha256, tmp_path / "file")
    assert hashlib.sha256(await _read(store, sha256)).hexdigest() == sha256


@pytest.mark.parametrize("size", [10, 10 << 20])
async def test_a_file_that_is_not_its_digest_is_refused_and_leaves_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    sha256 = _write(tmp_path / "file", os.urandom(size))
    content = (tmp_path / "file").read_bytes()
    (tmp_path / "file").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ProblemError, match="it has changed") as refused:
        await store.put_file(TENANT, sha256, tmp_path / "file")
    assert refused.value.code == "verification_failed"
    assert not await store.exists(TENANT, sha256)


async def test_one_tenant_does_not_see_anothers_blob(store: Store, tmp_path: Path) -> None:
    sha256 = _write(tmp_path / "file", b"private")
    await store.put_file(TENANT, sha256, tmp_path / "file")
    assert not await store.exists("tnt_0002", sha256)
    with pytest.raises(ProblemError) as missing:
        await _read(store, sha256, tenant="tnt_0002")
    assert missing.value.code == "service_unavailable"


async def test_delete_removes_and_may_be_repeated(store: Store, tmp_path: Path) -> None:
    sha256 = _write(tmp_path / "file", b"short-lived")
    await store.put_file(TENANT, sha256, tmp_path / "file")
    await store.delete(TENANT, sha256)
    await store.delete(TENANT, sha256)
    assert not await store.exists(TENANT, sha256)


async def test_lists_its_blobs_and_nothing_else(store: Store, tmp_path: Path) -> None:
    begun = datetime.now(UTC)
    small, large = _write(tmp_path / "small", b"x"), _write(tmp_path / "large", bytes(1_000))
    await store.put_file(TENANT, small, tmp_path / "small")
    await store.put_file("tnt_0002", small, tmp_path / "small")
    await store.put_file(TENANT, large, tmp_path / "large")
    if isinstance(store, LocalStore):
        (store.folder / "README").write_text("the operator's own")
        (store.folder / TENANT / small[:2] / "notes.txt").write_text("too")
    found = [blob async for blob in store.blobs()]
    assert sorted((blob.tenant_id, blob.sha256, blob.size) for blob in found) == sorted(
        [(TENANT, small, 1), ("tnt_0002", small, 1), (TENANT, large, 1_000)]
    )
    assert all(abs(blob.modified_at - begun) < timedelta(seconds=60) for blob in found)


async def test_a_store_without_broken_uploads_has_none_to_drop(store: Store) -> None:
    assert await store.drop_unfinished(datetime.now(UTC)) == 0


async def test_pieces_of_a_broken_upload_are_dropped_when_they_are_old(store: Store, tmp_path: Path) -> None:
    sha256 = _write(tmp_path / "file", b"whole")
    await store.put_file(TENANT, sha256, tmp_path / "file")
    if isinstance(store, LocalStore):
        (store.folder / TENANT / sha256[:2] / ".incoming-x1").write_bytes(b"hal")
    else:
        assert isinstance(store, s3.S3Store)
        store._client.create_multipart_upload(Bucket=store.bucket, Key=f"{store.prefix}/{TENANT}/{'0' * 64}")
    now = datetime.now(UTC)
    assert await store.drop_unfinished(now - timedelta(hours=1)) == 0
    assert await store.drop_unfinished(now + timedelta(minutes=1)) == 1
    assert await store.drop_unfinished(now + timedelta(minutes=1)) == 0
    assert await store.exists(TENANT, sha256)


async def test_the_same_blob_put_many_times_at_once_is_one_blob(store: Store, tmp_path: Path) -> None:
    sha256 = _write(tmp_path / "file", os.urandom(300_000))
    await asyncio.gather(*(store.put_file(TENANT, sha256, tmp_path / "file") for _ in range(4)))
    assert hashlib.sha256(await _read(store, sha256)).hexdigest() == sha256


async def test_a_link_to_another_file_is_refused(store: Store, tmp_path: Path) -> None:
    sha256 = _write(tmp_path / "secret", b"keyring")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "secret")
    with pytest.raises(ProblemError, match="symbolic link"):
        await store.put_file(TENANT, sha256, tmp_path / "model.safetensors")


@pytest.mark.parametrize(("tenant", "sha256"), [("../other", "0" * 64), (TENANT, "../../etc/passwd"), (TENANT, "A" * 64)])
async def test_names_that_are_no_tenant_or_digest_are_refused(store: Store, tenant: str, sha256: str) -> None:
    with pytest.raises(ProblemError):
        await store.exists(tenant, sha256)


async def test_a_later_write_to_the_source_does_not_reach_the_blob(tmp_path: Path) -> None:
    async with open_store((tmp_path / "store").as_uri()) as store:
        sha256 = _write(tmp_path / "file", b"as verified")
        await store.put_file(TENANT, sha256, tmp_path / "file")
        with (tmp_path / "file").open("r+b") as zombie:
            zombie.write(b"overwritten")
        assert await _read(store, sha256) == b"as verified"


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, "disk_full"), (errno.EIO, "service_unavailable")])
async def test_a_write_that_fails_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    store = open_store((tmp_path / "store").as_uri())
    sha256 = _write(tmp_path / "file", os.urandom(200_000))
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ProblemError) as failed:
        await store.put_file(TENANT, sha256, tmp_path / "file")
    assert failed.value.code == code
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("url", ["artifacts", "file://elsewhere/folder", "http://host/bucket", "s3://"])
def test_an_unknown_kind_of_store_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="SECATEUR_STORE_URL"):
        open_store(url)


async def test_a_store_that_is_away_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    (tmp_path / "a-file").touch()
    for url, endpoint in [("s3://artifacts", "http://127.0.0.1:9"), ((tmp_path / "a-file").as_uri(), None)]:
        async with open_store(url, endpoint=endpoint) as store:
            with pytest.raises(ProblemError) as away:
                await store.check()
            assert away.value.code == "service_unavailable"
