"""The API as a process of its own: what it imports, and what it writes to its log."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from httpx2 import AsyncClient, ConnectError

from app.accounts.bootstrap import bootstrap
from app.kit.db import Database
from app.settings import DatabaseSettings, Settings
from tests.api.jobs import body
from tests.api.models import write_model
from tests.servers import free_port


def test_the_api_imports_no_torch_and_no_files_of_models() -> None:
    heavy = {"torch", "transformers", "safetensors", "datasets", "boto3"}
    script = f"import sys, app.main; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_the_log_is_json_with_request_ids_and_without_secrets(
    tmp_path: Path, sqlite_url: str, broker_url: str
) -> None:
    token = "hf_" + "Secret" * 4
    async with run_api(tmp_path, sqlite_url, broker_url) as (client, process):
        key = client.headers["authorization"].removeprefix("Bearer ")
        client.headers["X-Request-Id"] = "trace-7"
        await client.put("/v1/secrets/hub_token", json={"value": token})
        await client.put("/v1/secrets/hub_token", json={"value": token, "valeu": token})
        await client.get(f"/v1/jobs/{key}?cursor={token}")
        process.terminate()
        output = process.communicate(timeout=20)[0].decode()
    lines = [json.loads(line) for line in output.splitlines()]
    put = next(line for line in lines if line.get("path") == "/v1/secrets/hub_token")
    assert (put["request_id"], put["status"], put["tenant"], put["level"]) == ("trace-7", 204, "default", "info")
    assert token not in output
    assert key not in output


async def test_those_who_wait_do_not_keep_a_service_from_stopping(tmp_path: Path, sqlite_url: str, broker_url: str) -> None:
    write_model(tmp_path / "models" / "tiny")
    async with run_api(tmp_path, sqlite_url, broker_url) as (client, process):
        job = (await client.post("/v1/jobs", json=body())).json()
        waiting = asyncio.create_task(client.get(f"/v1/jobs/{job['id']}", params={"wait": 50}, timeout=60))
        await asyncio.sleep(0.5)
        process.terminate()
        assert (await waiting).json()["status"] == "queued"
        process.communicate(timeout=30)
    assert process.returncode is not None


@asynccontextmanager
async def run_api(
    state: Path, database_url: str, broker_url: str
) -> AsyncIterator[tuple[AsyncClient, subprocess.Popen[bytes]]]:
    """A client of the API in a process of its own, and that process; its output is all of its log."""
    database = Database(database_url)
    settings = Settings(state=state, database=DatabaseSettings(url=database_url))
    key = (await bootstrap(database, settings)).read_text().strip()
    await database.close()
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--factory", "app.main:create_app", "--port", str(port)]
    areas = {"SECATEUR_STATE": str(state), "SECATEUR_DATABASE_URL": database_url, "SECATEUR_BROKER_URL": broker_url}
    with subprocess.Popen(command, env=os.environ | areas, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        headers = {"Authorization": f"Bearer {key}"}
        try:
            async with AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:
                await _until_it_answers(client)
                yield client, process
        finally:
            process.kill()


async def _until_it_answers(client: AsyncClient) -> None:
    for _ in range(600):
        try:
            await client.get("/livez")
        except ConnectError:
            await asyncio.sleep(0.1)
        else:
            return
    raise AssertionError("the API did not start")
