"""`POST /v1/estimates`: what a job would cost, by what earlier jobs have measured, and nothing kept of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from app.accounts.keys import Scope
from app.jobs.models import IdempotencyRecord, Job, OutboxMessage
from tests.api.conftest import Service
from tests.api.jobs import body, make_key
from tests.api.work import succeed


async def estimate(service: Service, **changes: Any) -> dict[str, Any]:
    answer = await service.client.post("/v1/estimates", json=body(**changes))
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def test_it_tells_what_the_job_would_cost_and_keeps_nothing(service: Service) -> None:
    told = await estimate(service)
    assert told["parameters"] == 8 * 16 + 3 * 8 + 4 * 64 + 3 * 96
    assert told["pruned_parameters"] == 4 * 64 + 3 * 96
    assert told["tokens"] == {"calibration": 32, "evaluation": 0}
    assert told["peak_memory_bytes"] > told["device_memory_bytes"] > 0
    assert told["queue"] == "cpu"
    assert told["recipe"]["calibration"]["dataset"] == "wikitext2-sample"
    assert 0 < told["seconds"]["low"] < told["seconds"]["high"]
    async with service.database.read() as session:
        for table in (Job, OutboxMessage, IdempotencyRecord):
            assert await session.scalar(select(func.count()).select_from(table)) == 0


async def test_it_goes_by_the_pace_that_jobs_have_measured(service: Service, tmp_path: Path) -> None:
    first = await estimate(service)
    assert first["pace"]["measured"] is False
    for number, pace in enumerate((1e6, 3e6, 2e6)):
        (tmp_path / str(number)).mkdir()
        await succeed(service, tmp_path / str(number), {}, operations_per_second=pace)
    await succeed(service, tmp_path, {})  # one that has measured nothing
    then = await estimate(service)
    assert then["pace"] == {"operations_per_second": 2e6, "measured": True}
    spreads = [told["seconds"]["high"] / told["seconds"]["low"] for told in (first, then)]
    assert spreads[1] < spreads[0]
    other = await estimate(service, method={"name": "sparsegpt"})
    assert other["pace"] == then["pace"]  # no job of that method yet: those of others are better than a default


@pytest.mark.parametrize(
    ("changes", "status", "pointer"),
    [
        ({"sparsity": {"pattern": "2:7"}}, 422, "/sparsity/pattern"),
        ({"sparsity": {}}, 422, "/sparsity/target"),
        ({"model": {"source": "local", "id": "nowhere"}}, 404, "/model/id"),
        ({"calibration": {"sequence_length": 129, "samples": 1}}, 422, "/calibration/sequence_length"),
        ({"schedule": {"priority": 99}}, 422, "/schedule/priority"),
    ],
)
async def test_what_would_refuse_the_job_is_told(service: Service, changes: Any, status: int, pointer: str) -> None:
    answer = await service.client.post("/v1/estimates", json=body(**changes))
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (status, pointer)


async def test_an_evaluation_has_an_estimate_too(service: Service) -> None:
    asked = {"kind": "evaluate", "model": {"source": "local", "id": "tiny"}}
    asked["evaluation"] = {"perplexity": {"sequence_length": 64, "max_windows": 2}}
    told = (await service.client.post("/v1/estimates", json=asked)).json()
    assert (told["tokens"]["evaluation"], told["disk_bytes"]) == (128, 0)


async def test_it_takes_a_key_that_may_submit(service: Service) -> None:
    key = await make_key(service.database, service.tenant, service.keyring, [Scope.JOBS_READ])
    async with service.client_with(key) as reader:
        assert (await reader.post("/v1/estimates", json=body())).status_code == 403
