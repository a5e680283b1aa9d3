"""`/v1/sweeps`: all jobs or none, their table, and an end to all of them at once."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import func, select

from app.jobs import claims
from app.jobs.models import Job, OutboxMessage
from app.kit import clock
from app.sweeps.models import Sweep, SweepJob
from secateur.schemas.sweeps import MAX_JOBS
from tests.api.conftest import Service
from tests.api.jobs import make_key, make_tenant
from tests.api.work import claim

METHODS = [{"name": "magnitude"}, {"name": "wanda"}, {"name": "sparsegpt"}]


def sweep(**changes: Any) -> dict[str, Any]:
    """The body of a sweep over the model `tiny`: six jobs."""
    return {
        "model": {"source": "local", "id": "tiny"},
        "methods": METHODS,
        "sparsities": [0.5],
        "patterns": ["2:4"],
        "calibration": {"samples": 2, "sequence_length": 16},
        **changes,
    }


async def submit(service: Service, **changes: Any) -> dict[str, Any]:
    answer = await service.client.post("/v1/sweeps", json=sweep(**changes))
    assert answer.status_code == 202, answer.text
    made: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/v1/sweeps/{made['id']}"
    return made


async def end(service: Service, number: int) -> Job:
    """The oldest queued job succeeds, with numbers of its own."""
    job = await claim(service)
    metrics = {"sparsity": 0.5, "perplexity": {"dense": 20.0, "pruned": 30.0 + number}, "seconds": {"total": 1.0 + number}}
    async with service.database.write() as session:
        await claims.succeed(session, job.id, 1, metrics=metrics, report={}, artifacts=[], at=clock.now())
    return job


async def rows(service: Service) -> list[int]:
    async with service.database.read() as session:
        tables = (Sweep, SweepJob, Job, OutboxMessage)
        return [await session.scalar(select(func.count()).select_from(table)) or 0 for table in tables]


async def test_every_method_meets_every_sparsity_and_pattern(service: Service) -> None:
    made = await submit(service, metadata={"team": "search"})
    assert (made["status"], made["progress"]) == ("queued", {"done": 0, "total": 6, "unit": "jobs"})
    cells = [(row["method"]["name"], row["pattern"], row["target"]) for row in made["table"]]
    patterns = (("unstructured", 0.5), ("2:4", 0.5))
    assert cells == [(method["name"], *pattern) for method in METHODS for pattern in patterns]
    for row in made["table"]:
        job = (await service.client.get(f"/v1/jobs/{row['job_id']}")).json()
        assert (job["status"], job["repository"]) == ("queued", row["repository"])
        assert job["recipe"]["method"] == row["method"]
        assert (job["recipe"]["calibration"]["samples"], job["recipe"]["metadata"]) == (2, {"team": "search"})
    assert len({row["repository"] for row in made["table"]}) == 6
    assert await rows(service) == [1, 6, 6, 6]


async def test_methods_of_one_name_have_outputs_of_their_own(service: Service) -> None:
    made = await submit(service, methods=[{"name": "wanda"}, {"name": "wanda", "comparison": "layer"}], patterns=[])
    assert [row["repository"] for row in made["table"]] == ["default/tiny-wanda-50", "default/tiny-wanda-50-2"]


async def test_its_table_is_what_its_jobs_have_measured(service: Service) -> None:
    made = await submit(service, patterns=[])
    jobs = [await end(service, number) for number in range(2)]
    running = (await service.client.get(f"/v1/sweeps/{made['id']}")).json()
    assert (running["status"], running["progress"]["done"], running["finished_at"]) == ("running", 2, None)
    jobs.append(await end(service, 2))
    done = (await service.client.get(f"/v1/sweeps/{made['id']}")).json()
    assert (done["status"], done["progress"]["done"]) == ("succeeded", 3)
    assert done["finished_at"] is not None
    numbers = {job.id: number for number, job in enumerate(jobs)}
    for row in done["table"]:
        number = numbers[row["job_id"]]
        told = (row["sparsity"], row["perplexity_dense"], row["perplexity_pruned"], row["seconds"])
        assert told == (0.5, 20.0, 30.0 + number, 1.0 + number)


async def test_cancel_stops_all_of_it_and_keeps_what_has_succeeded(service: Service) -> None:
    made = await submit(service)
    finished, running = await end(service, 0), await claim(service)
    for _ in range(2):
        cancelled = (await service.client.post(f"/v1/sweeps/{made['id']}/cancel")).json()
        statuses = {row["job_id"]: row["status"] for row in cancelled["table"]}
        assert cancelled["status"] == "cancelling"
        assert (statuses.pop(finished.id), statuses.pop(running.id)) == ("succeeded", "cancelling")
        assert set(statuses.values()) == {"cancelled"}
    async with service.database.write() as session:
        await claims.confirm_cancelled(session, running.id, 1, at=clock.now())
    assert (await service.client.get(f"/v1/sweeps/{made['id']}")).json()["status"] == "cancelled"


async def test_one_job_that_fails_fails_the_sweep_and_no_other_job(service: Service) -> None:
    made = await submit(service, patterns=[])
    job = await claim(service)
    async with service.database.write() as session:
        error = {"code": "disk_full", "detail": "no room", "title": "", "status": 507, "type": "x"}
        await claims.fail(session, job.id, 1, error=error, max_barren_attempts=1, at=clock.now())
    assert (await service.client.get(f"/v1/sweeps/{made['id']}")).json()["status"] == "running"
    for number in range(2):
        await end(service, number)
    done = (await service.client.get(f"/v1/sweeps/{made['id']}")).json()
    assert (done["status"], done["progress"]["done"]) == ("failed", 3)


async def test_delete_leaves_tombstones_of_the_jobs_and_waits_for_their_end(service: Service) -> None:
    made = await submit(service, patterns=[])
    refused = await service.client.delete(f"/v1/sweeps/{made['id']}")
    assert (refused.status_code, refused.json()["code"]) == (409, "sweep_not_finished")
    await service.client.post(f"/v1/sweeps/{made['id']}/cancel")
    assert (await service.client.delete(f"/v1/sweeps/{made['id']}")).status_code == 204
    assert (await service.client.get(f"/v1/sweeps/{made['id']}")).status_code == 404
    assert (await service.client.get("/v1/jobs")).json()["data"] == []
    tombstone = (await service.client.get(f"/v1/jobs/{made['table'][0]['job_id']}")).json()
    assert tombstone["deleted_at"] is not None


async def test_the_same_request_twice_makes_one_sweep(service: Service) -> None:
    key = {"Idempotency-Key": "once"}
    first, second = [(await service.client.post("/v1/sweeps", json=sweep(), headers=key)).json() for _ in range(2)]
    assert first == second
    assert await rows(service) == [1, 6, 6, 6]
    other = await service.client.post("/v1/sweeps", json=sweep(patterns=[]), headers=key)
    assert other.json()["code"] == "idempotency_key_reused"


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"methods": []}, "/methods"),
        ({"methods": [{"name": "wanda"}, {"name": "lottery"}]}, "/methods/1/name"),
        ({"methods": [{"name": "wanda", "damping": 1}]}, "/methods/0/damping"),
        ({"methods": [{"name": "wanda"}, {"name": "wanda"}]}, "/methods"),
        ({"sparsities": [0.5, 1.0]}, "/sparsities/1"),
        ({"sparsities": [0.5, 0.5]}, "/sparsities"),
        ({"sparsities": [], "patterns": []}, ""),
        ({"patterns": ["2:4", "4:2"]}, "/patterns/1"),
        ({"patterns": ["unstructured"]}, "/patterns/0"),
        ({"patterns": ["2:4", "3:7"]}, "/patterns/1"),  # which does not divide the model's inputs
        ({"output": {"name": "mine"}}, "/output"),
        ({"model": {"source": "local", "id": "nowhere"}}, "/model/id"),
        ({"calibration": {"samples": 1, "sequence_length": 129}}, "/calibration/sequence_length"),
        ({"method": {"name": "wanda"}}, "/method"),
        ({"kind": "evaluate"}, "/kind"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_pointed_at_and_no_job_is_made(service: Service, changes: Any, pointer: str) -> None:
    answer = await service.client.post("/v1/sweeps", json=sweep(**changes))
    assert answer.status_code in {404, 422}, answer.text
    assert answer.json()["errors"][0]["pointer"] == pointer, answer.text
    assert await rows(service) == [0, 0, 0, 0]


async def test_there_is_a_most_that_a_sweep_may_be(service: Service) -> None:
    answer = await service.client.post(
        "/v1/sweeps", json=sweep(sparsities=[x / 20 for x in range(1, 17)], patterns=["1:2"] * 6)
    )
    assert answer.status_code == 422
    many = sweep(methods=[{"name": "wanda"}, {"name": "magnitude"}, {"name": "ria"}, {"name": "sparsegpt"}],
                 sparsities=[x / 20 for x in range(1, 17)], patterns=["2:4"])  # fmt: skip
    assert str(MAX_JOBS) in (await service.client.post("/v1/sweeps", json=many)).json()["detail"]


async def test_lists_are_paged_and_every_tenant_has_its_own(service: Service) -> None:
    made = [(await submit(service, methods=[{"name": "magnitude"}]))["id"] for _ in range(3)]
    first = (await service.client.get("/v1/sweeps?limit=2")).json()
    rest = (await service.client.get(f"/v1/sweeps?limit=2&cursor={first['next_cursor']}")).json()
    assert [one["id"] for one in first["data"] + rest["data"]] == made[::-1]
    stranger = await make_tenant(service.database, "stranger")
    key = await make_key(service.database, stranger, service.keyring)
    async with service.client_with(key) as client:
        assert (await client.get("/v1/sweeps")).json()["data"] == []
        for ask in (client.get(f"/v1/sweeps/{made[0]}"), client.delete(f"/v1/sweeps/{made[0]}"),
                    client.post(f"/v1/sweeps/{made[0]}/cancel")):  # fmt: skip
            assert (await ask).status_code == 404
