"""The bytes of artifacts: whole, in ranges, and not at all when the client has them."""

from __future__ import annotations

import asyncio
import hashlib
from base64 import b64decode
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.accounts.keys import Scope
from app.artifacts.endpoints import _disposition
from app.artifacts.models import Artifact
from app.artifacts.ranges import UnsatisfiableError, wanted_span
from app.artifacts.store import open_store
from app.kit import clock
from app.kit.ids import new_id
from tests.api.conftest import Service
from tests.api.jobs import make_job, make_key, make_tenant

CONTENT = bytes(range(256)) * 8_000  # more than one piece of the store
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ETAG = f'"{SHA256}"'


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """Bytes come from the store: one kind of database is enough here."""
    return sqlite_url


@pytest.fixture
async def url(service: Service, tmp_path: Path) -> str:
    """The address of an artifact that holds CONTENT."""
    return await make_artifact(service, tmp_path, CONTENT)


async def make_artifact(service: Service, folder: Path, content: bytes, name: str = "sub/model.safetensors") -> str:
    job = await make_job(service.database, service.tenant, status="succeeded")
    file = folder / "content"
    file.write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    async with open_store(service.settings.store_url) as store:
        await store.put_file(service.tenant.id, sha256, file)
    columns = {"tenant_id": service.tenant.id, "job_id": job.id, "created_at": clock.now()}
    async with service.database.write() as session:
        artifact = Artifact(id=new_id("art"), name=name, size=len(content), sha256=sha256, **columns)
        session.add(artifact)
    return f"/v1/artifacts/{artifact.id}"


async def test_the_whole_file_comes_with_its_digest(service: Service, url: str) -> None:
    response = await service.client.get(f"{url}/content")
    assert (response.status_code, response.content) == (200, CONTENT)
    headers = response.headers
    assert (headers["etag"], headers["accept-ranges"]) == (ETAG, "bytes")
    assert b64decode(headers["repr-digest"].removeprefix("sha-256=:").removesuffix(":")).hex() == SHA256
    assert headers["content-length"] == str(len(CONTENT))
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "private, max-age=31536000, immutable"
    assert headers["content-disposition"] == "attachment; filename=\"model.safetensors\"; filename*=UTF-8''model.safetensors"
    meta = (await service.client.get(url)).json()
    assert (meta["name"], meta["size"], meta["sha256"]) == ("sub/model.safetensors", len(CONTENT), SHA256)


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=5-9", 5, 10),
        ("bytes=2047000-", 2_047_000, 2_048_000),
        ("bytes=-3", 2_047_997, 2_048_000),
        ("bytes=-9999999", 0, 2_048_000),
        ("bytes=1048570-1048580", 1_048_570, 1_048_581),
        ("bytes=5-99999999", 5, 2_048_000),
    ],
)
async def test_a_range_is_exactly_what_was_asked_for(service: Service, url: str, asked: str, start: int, end: int) -> None:
    response = await service.client.get(f"{url}/content", headers={"Range": asked})
    assert (response.status_code, response.content) == (206, CONTENT[start:end])
    assert response.headers["content-range"] == f"bytes {start}-{end - 1}/{len(CONTENT)}"
    assert response.headers["content-length"] == str(end - start)
    assert response.headers["etag"] == ETAG


@pytest.mark.parametrize("asked", ["bytes=0-1,4-5", "bytes=9-5", "bytes=", "bytes=-", "lines=0-1", "bytes=a-b", "bytes=٣-٤"])
async def test_a_range_that_is_none_gets_the_whole_file(service: Service, url: str, asked: str) -> None:
    response = await service.client.get(f"{url}/content", headers={b"Range": asked.encode()})
    assert (response.status_code, len(response.content)) == (200, len(CONTENT))


@pytest.mark.parametrize("asked", ["bytes=2048000-", "bytes=9999999-99999999", "bytes=-0"])
async def test_a_range_behind_the_end_is_not_satisfiable(service: Service, url: str, asked: str) -> None:
    response = await service.client.get(f"{url}/content", headers={"Range": asked})
    assert (response.status_code, response.json()["code"]) == (416, "range_not_satisfiable")
    assert response.headers["content-range"] == f"bytes */{len(CONTENT)}"


@pytest.mark.parametrize(
    ("if_range", "status"), [(ETAG, 206), ('"other"', 200), (f"W/{ETAG}", 200), ("Sun, 22 Nov 2026 10:00:00 GMT", 200)]
)
async def test_a_download_goes_on_only_if_the_file_is_the_same(
    service: Service, url: str, if_range: str, status: int
) -> None:
    headers = {"Range": "bytes=100-", "If-Range": if_range}
    response = await service.client.get(f"{url}/content", headers=headers)
    assert (response.status_code, response.content) == (status, CONTENT[100:] if status == 206 else CONTENT)


@pytest.mark.parametrize("tags", [ETAG, f'"a", {ETAG}', f"W/{ETAG}", "*"])
async def test_a_file_that_the_client_has_is_not_sent(service: Service, url: str, tags: str) -> None:
    response = await service.client.get(f"{url}/content", headers={"If-None-Match": tags, "Range": "bytes=0-1"})
    assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", ETAG)
    response = await service.client.get(f"{url}/content", headers={"If-None-Match": '"other"'})
    assert response.status_code == 200


async def test_head_tells_what_get_would_send(service: Service, url: str) -> None:
    for headers, status, length in (({}, 200, len(CONTENT)), ({"Range": "bytes=1-4"}, 206, 4)):
        response = await service.client.head(f"{url}/content", headers=headers)
        assert (response.status_code, response.headers["content-length"], response.content) == (status, str(length), b"")


async def test_an_empty_file_is_a_file(service: Service, tmp_path: Path) -> None:
    url = await make_artifact(service, tmp_path, b"")
    response = await service.client.get(f"{url}/content")
    assert (response.status_code, response.content, response.headers["content-length"]) == (200, b"", "0")
    assert (await service.client.get(f"{url}/content", headers={"Range": "bytes=0-"})).status_code == 416


async def test_bytes_that_the_store_has_lost_are_a_problem_and_no_broken_download(service: Service, url: str) -> None:
    async with open_store(service.settings.store_url) as store:
        await store.delete(service.tenant.id, SHA256)
    response = await service.client.get(f"{url}/content")
    assert (response.status_code, response.json()["code"]) == (503, "service_unavailable")


async def test_a_client_that_goes_away_is_no_error_of_ours(
    service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = await make_artifact(service, tmp_path, bytes(64_000_000))
    async with service.client.stream("GET", f"{url}/content") as response:
        async for _ in response.aiter_bytes():
            break
    for _ in range(100):
        if f"{url}/content" in caplog.text:
            break
        await asyncio.sleep(0.05)
    assert f"{url}/content" in caplog.text
    assert "unforeseen_error" not in caplog.text


async def test_other_tenants_and_other_keys_get_nothing(service: Service, url: str) -> None:
    stranger = await make_tenant(service.database, "stranger")
    async with service.client_with(await make_key(service.database, stranger, service.keyring)) as client:
        for path in (url, f"{url}/content"):
            assert (await client.get(path)).json()["code"] == "not_found"
    key = await make_key(service.database, service.tenant, service.keyring, [Scope.JOBS_READ, Scope.MODELS_READ])
    async with service.client_with(key) as client:
        assert (await client.get(f"{url}/content")).json()["code"] == "forbidden"


async def test_a_hostile_name_cannot_leave_its_header(service: Service, tmp_path: Path) -> None:
    url = await make_artifact(service, tmp_path, b"x", 'a"; evil=1\r\nSet-Cookie: b/é".bin')
    response = await service.client.get(f"{url}/content")
    assert response.headers["content-disposition"] == "attachment; filename=\"__.bin\"; filename*=UTF-8''%C3%A9%22.bin"
    assert "set-cookie" not in response.headers


@given(st.text(min_size=1, max_size=30))
def test_a_disposition_is_one_header_whatever_the_name(name: str) -> None:
    value = _disposition(name.encode("utf-8", "replace").decode())
    assert value.isascii()
    assert value.isprintable()
    assert value.count('"') == 2


@dataclass
class Ask:
    first: int | None
    last: int | None
    size: int
    headers: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        text = f"bytes={'' if self.first is None else self.first}-{'' if self.last is None else self.last}"
        self.headers = {"range": text}


@given(st.builds(Ask, st.none() | st.integers(0, 30), st.none() | st.integers(0, 30), st.integers(0, 20)))
def test_a_span_is_what_slicing_gives(ask: Ask) -> None:
    whole = list(range(ask.size))
    if ask.first is None:
        wanted = None if ask.last is None else whole[max(ask.size - ask.last, 0) :]
    elif ask.last is not None and ask.last < ask.first:
        wanted = None
    else:
        wanted = whole[ask.first : None if ask.last is None else ask.last + 1]
    try:
        span = wanted_span(ask.headers, size=ask.size, sha256="x")
    except UnsatisfiableError:
        assert wanted == []
    else:
        assert wanted == (None if span is None else whole[slice(*span)])
        assert wanted != []
