"""The API as a process of its own: what it imports, and what it writes to its log."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

from httpx2 import AsyncClient, ConnectError

from app.accounts.bootstrap import bootstrap
from app.kit.db import Database
from app.settings import DatabaseSettings, Settings
from tests.servers import free_port


def test_the_api_imports_no_torch_and_no_files_of_models() -> None:
    heavy = {"torch", "transformers", "safetensors", "datasets", "boto3"}
    script = f"import sys, app.main; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


async def test_the_log_is_json_with_request_ids_and_without_secrets(
    tmp_path: Path, sqlite_url: str, broker_url: str
) -> None:
    settings = Settings(state=tmp_path, database=DatabaseSettings(url=sqlite_url))
    database = Database(sqlite_url)
    key = (await bootstrap(database, settings)).read_text().strip()
    await database.close()
    token, port = "hf_" + "Secret" * 4, free_port()
    command = [sys.executable, "-m", "uvicorn", "--factory", "app.main:create_app", "--port", str(port)]
    env = {
        **os.environ,
        "SECATEUR_STATE": str(tmp_path),
        "SECATEUR_DATABASE_URL": sqlite_url,
        "SECATEUR_BROKER_URL": broker_url,
    }
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        headers = {"Authorization": f"Bearer {key}", "X-Request-Id": "trace-7"}
        async with AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=headers) as client:
            await _until_it_answers(client)
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


async def _until_it_answers(client: AsyncClient) -> None:
    for _ in range(200):
        try:
            await client.get("/livez")
        except ConnectError:
            await asyncio.sleep(0.1)
        else:
            return
    raise AssertionError("the API did not start")
