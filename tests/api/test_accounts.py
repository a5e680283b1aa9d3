"""Keys, the keyring, secrets, and the first start."""

from __future__ import annotations

import asyncio
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import select

from app.accounts import keys
from app.accounts.bootstrap import bootstrap
from app.accounts.models import ApiKey, Secret, Tenant
from app.accounts.secrets import SecretName, secret_of
from app.kit import clock
from app.kit.db import Database
from app.kit.keyring import load_keyring
from app.settings import Settings
from secateur.problems import ProblemError
from tests.api.conftest import Service
from tests.api.jobs import make_key, make_tenant

TOKEN = "hf_" + "Secret" * 4


def mode(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


async def test_the_first_start_makes_a_tenant_and_a_key_and_the_next_ones_nothing(
    database: Database, settings: Settings
) -> None:
    file = await bootstrap(database, settings)
    key = file.read_text().strip()
    assert mode(file) == 0o600
    assert keys.is_well_formed(key)
    assert await bootstrap(database, settings) == file
    assert file.read_text().strip() == key
    async with database.read() as session:
        (tenant,) = await session.scalars(select(Tenant))
        (row,) = await session.scalars(select(ApiKey))
    assert (tenant.slug, tenant.reads_local_models, row.scopes, row.tenant_id) == ("default", True, ["admin"], tenant.id)
    assert key not in str(vars(row))


async def test_several_processes_may_start_first(database: Database, settings: Settings) -> None:
    files = await asyncio.gather(*(bootstrap(database, settings) for _ in range(5)))
    assert len(set(files)) == 1
    async with database.read() as session:
        assert len((await session.scalars(select(Tenant))).all()) == 1
        assert len((await session.scalars(select(ApiKey))).all()) == 1


async def test_a_key_outlives_the_database(database: Database, settings: Settings, tmp_path: Path) -> None:
    settings.state_folder.mkdir(exist_ok=True)
    key = keys.generate()
    (settings.state_folder / "admin.key").write_text(key)
    await bootstrap(database, settings)
    async with database.read() as session:
        keyring = load_keyring(settings.keyring_file)
        assert await keys.find(session, key, keyring=keyring, at=clock.now()) is not None


async def test_a_revoked_admin_key_stays_revoked(service: Service) -> None:
    async with service.database.write() as session:
        (await session.scalars(select(ApiKey))).one().revoked_at = clock.now()
    await bootstrap(service.database, service.settings)
    assert (await service.client.get("/v1/jobs")).status_code == 401


def test_a_keyring_is_made_once_by_whoever_is_first(tmp_path: Path) -> None:
    file = tmp_path / "new" / "keyring.json"
    with ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(lambda _: load_keyring(file).digest_of("key"), range(8)))
    assert len(digests) == 1
    assert mode(file) == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["keyring.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"api_keys": "!", "cursors": "", "secrets": []}'])
def test_a_broken_keyring_is_named_and_not_replaced(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keyring.json"
    file.write_text(content)
    with pytest.raises(ProblemError, match=r"keyring\.json cannot be used") as problem:
        load_keyring(file)
    assert problem.value.hint
    assert file.read_text() == content


def test_a_new_key_of_the_keyring_still_reads_old_secrets(tmp_path: Path) -> None:
    file, other = tmp_path / "keyring.json", tmp_path / "other.json"
    old = load_keyring(file).encrypt(TOKEN)
    load_keyring(other)
    document, newer = json.loads(file.read_text()), json.loads(other.read_text())
    document["secrets"] = newer["secrets"] + document["secrets"]
    file.write_text(json.dumps(document))
    rotated = load_keyring(file)
    assert rotated.decrypt(old) == TOKEN
    assert load_keyring(other).decrypt(rotated.encrypt(TOKEN)) == TOKEN
    with pytest.raises(ProblemError, match="not in the keyring"):
        load_keyring(other).decrypt(old)


def test_a_key_with_a_typing_error_is_recognised_as_none() -> None:
    key = keys.generate()
    assert keys.is_well_formed(key)
    for place in range(len(key)):
        assert not keys.is_well_formed(key[:place] + ("a" if key[place] != "a" else "b") + key[place + 1 :])
    assert not keys.is_well_formed(key + "0")
    assert not keys.is_well_formed("sct_")


@pytest.mark.parametrize("column", ["revoked_at", "expires_at"])
async def test_a_key_that_is_over_opens_nothing(service: Service, column: str) -> None:
    key = keys.generate()
    async with service.database.write() as session:
        row = keys.add(
            session, service.tenant, key, name="x", scopes=[keys.Scope.ADMIN], keyring=service.keyring, at=clock.now()
        )
        setattr(row, column, clock.now() - timedelta(seconds=1))
    async with service.client_with(key) as client:
        assert (await client.get("/v1/jobs")).status_code == 401
    good = await make_key(service.database, service.tenant, service.keyring, expires_at=clock.now() + timedelta(hours=1))
    async with service.client_with(good) as client:
        assert (await client.get("/v1/jobs")).status_code == 200


async def test_a_hub_token_is_kept_encrypted_and_never_given_back(service: Service) -> None:
    stranger = await make_tenant(service.database, "stranger")

    async def stored(tenant: Tenant) -> str | None:
        async with service.database.read() as session:
            return await secret_of(session, tenant.id, SecretName.HUB_TOKEN, keyring=service.keyring)

    assert await stored(service.tenant) is None
    for token in ("hf_first", TOKEN):
        response = await service.client.put("/v1/secrets/hub_token", json={"value": token})
        assert (response.status_code, response.content) == (204, b"")
    assert (await stored(service.tenant), await stored(stranger)) == (TOKEN, None)
    async with service.database.read() as session:
        assert TOKEN.encode() not in (await session.scalars(select(Secret))).one().ciphertext
    assert (await service.client.get("/v1/secrets/hub_token")).status_code == 405
    for _ in range(2):
        assert (await service.client.delete("/v1/secrets/hub_token")).status_code == 204
    assert await stored(service.tenant) is None


async def test_there_are_only_the_secrets_that_somebody_uses(service: Service) -> None:
    for method in ("PUT", "DELETE"):
        response = await service.client.request(method, "/v1/secrets/root_password", json={"value": "x"})
        assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/path/name")
    assert (await service.client.put("/v1/secrets/mlflow_token", json={"value": "x"})).status_code == 204


@pytest.mark.parametrize("value", ["", "a b", "é", "a\n", "x" * 501, 7])
async def test_what_is_no_token_is_refused_and_not_repeated(service: Service, value: object) -> None:
    response = await service.client.put("/v1/secrets/hub_token", json={"value": value})
    assert (response.status_code, response.json()["errors"][0]["pointer"]) == (422, "/value")
    # Not just a few of them: the request's id is random, and may have three in a row.
    assert "x" * 10 not in response.text


async def test_reading_keys_may_not_change_secrets(service: Service) -> None:
    key = await make_key(service.database, service.tenant, service.keyring, [keys.Scope.JOBS_READ])
    async with service.client_with(key) as client:
        assert (await client.put("/v1/secrets/hub_token", json={"value": "x"})).status_code == 403
        assert (await client.delete("/v1/secrets/hub_token")).status_code == 403
