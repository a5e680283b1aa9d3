"""Every error has one shape, and points at what is wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import FastAPI
from httpx2 import ASGITransport, AsyncClient, Response
from sqlalchemy import select

from app.accounts import keys
from app.jobs.models import Job
from app.kit import errors
from app.kit.requests import RequestContext
from app.settings import Settings
from tests.api.conftest import Service, serve
from tests.api.jobs import body
from tests.api.models import write_model


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    """What is wrong with a request is found before the database: one kind of it is enough here."""
    return sqlite_url


def check(response: Response, status: int, code: str) -> dict[str, Any]:
    """The problem, if it has the shape that every problem has."""
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert (response.status_code, problem["status"], problem["code"]) == (status, status, code), problem
    assert problem["type"] == f"https://secateur.dev/errors/{code.replace('_', '-')}"
    assert problem["request_id"] == response.headers["x-request-id"]
    assert problem["title"]
    assert problem["detail"]
    return problem


@pytest.mark.parametrize(
    ("changes", "pointers"),
    [
        ({"method": {"name": "wanda", "damping": 1}}, ["/method/damping"]),
        ({"method": {"name": "sparsegpt", "damping": 2}}, ["/method/damping"]),
        ({"method": {"name": "lottery"}}, ["/method/name"]),
        ({"method": {}}, ["/method/name"]),
        ({"method": "wanda"}, ["/method"]),
        ({"sparsity": {"target": 1.0}}, ["/sparsity/target"]),
        ({"sparsity": {"target": 0}}, ["/sparsity/target"]),
        ({"sparsity": {}}, ["/sparsity/target"]),
        ({"sparsity": {"pattern": "5:4"}}, ["/sparsity/pattern"]),
        ({"sparsity": {"pattern": "2:4", "target": 0.7}}, ["/sparsity/target"]),
        ({"sparsity": {"pattern": "2:7"}}, ["/sparsity/pattern"]),
        ({"calibration": {"sequence_length": 129, "samples": 1}}, ["/calibration/sequence_length"]),
        ({"model": {"source": "local", "id": "../tiny"}}, ["/model/id"]),
        ({"model": {"source": "local", "id": "tiny", "revision": "main"}}, ["/model"]),
        ({"model": {"source": "local", "id": "nowhere"}}, ["/model/id"]),
        ({"output": {"name": "dtype", "dtype": "int3"}}, ["/output/dtype"]),
        ({"metadata": {"a/b~c": 1}}, ["/metadata/a~1b~0c"]),
        ({"metadata": {"a": "\0"}}, ["/metadata/a"]),
        ({"kind": "plant"}, ["/kind"]),
        ({"kind": "evaluate"}, ["/method", "/sparsity", "/calibration"]),
        ({"colour": 1, "size": 2}, ["/colour", "/size"]),
    ],
)
async def test_what_is_wrong_in_a_recipe_is_pointed_at(service: Service, changes: Any, pointers: list[str]) -> None:
    response = await service.client.post("/v1/jobs", json=body(**changes))
    problem = check(response, response.status_code, response.json()["code"])
    assert problem["status"] in {404, 422}
    assert [fault["pointer"] for fault in problem["errors"]] == pointers
    assert problem["errors"][0]["detail"] in problem["detail"]
    async with service.database.read() as session:
        assert (await session.scalars(select(Job))).all() == []


@pytest.mark.parametrize(
    ("changes", "pointer"),
    [
        ({"evaluation": {}}, "/evaluation"),
        ({"evaluation": {"perplexity": {"dataset": "pile"}}}, "/evaluation/perplexity/dataset"),
        ({"evaluation": {"perplexity": {"sequence_length": 129}}}, "/evaluation/perplexity/sequence_length"),
        ({"dtype": "int8"}, "/dtype"),
        ({"output": {}}, "/output"),
        ({"model": {"source": "local", "id": "nowhere"}}, "/model/id"),
    ],
)
async def test_what_is_wrong_in_an_evaluation_is_pointed_at(service: Service, changes: Any, pointer: str) -> None:
    asked = {"kind": "evaluate", "model": {"source": "local", "id": "tiny"}, **changes}
    response = await service.client.post("/v1/jobs", json=asked)
    problem = check(response, response.status_code, response.json()["code"])
    assert [fault["pointer"] for fault in problem["errors"]] == [pointer]


async def test_models_that_cannot_be_pruned_are_refused_before_they_are_queued(service: Service) -> None:
    root = service.settings.models_root
    write_model(root / "coded", auto_map={"AutoModel": "evil.Model"})
    write_model(root / "alien", architectures=["AlienForCausalLM"], model_type="alien")
    write_model(root / "truncated")
    (root / "truncated" / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (write_model(root / "pickled") / "model.safetensors").rename(root / "pickled" / "pytorch_model.bin")
    (write_model(root / "mute") / "config.json").write_text("{")
    wanted = {
        "coded": "remote_code_refused", "alien": "unsupported_architecture", "truncated": "model_file_corrupt",
        "pickled": "model_not_safetensors", "mute": "model_config_invalid",
    }  # fmt: skip
    for name, code in wanted.items():
        response = await service.client.post("/v1/jobs", json=body(model={"source": "local", "id": name}))
        assert check(response, 422, code)["errors"][0]["pointer"] == "/model/id"


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, "bad_request"),
        (b"\xff", 400, "bad_request"),
        (b'{"kind": ' + b"9" * 5000 + b"}", 400, "bad_request"),
        (b"[" * 100_000, 400, "bad_request"),
        (b'"\\ud800"', 422, "validation_error"),
        (b"null", 422, "validation_error"),
        (b"[]", 422, "validation_error"),
        (b"", 422, "validation_error"),
        (b'{"sparsity": {"target": NaN}}', 422, "validation_error"),
        (json.dumps(body(metadata={"a": "\ud800"})).encode(), 422, "validation_error"),
    ],
)
async def test_a_body_that_cannot_be_read_is_a_clear_problem(
    service: Service, content: bytes, status: int, code: str
) -> None:
    response = await service.client.post("/v1/jobs", content=content, headers={"Content-Type": "application/json"})
    check(response, status, code)


async def test_what_the_router_does_not_know_is_a_problem_too(service: Service) -> None:
    client = service.client
    check(await client.get("/nowhere"), 404, "not_found")
    check(await client.get("/v1/jobs/"), 404, "not_found")
    check(await client.get("/v1/jobs/job_%00"), 400, "bad_request")
    check(await client.get("/v1/jobs?model=%00"), 400, "bad_request")
    refused = await client.delete("/v1/jobs")
    check(refused, 405, "method_not_allowed")
    assert refused.headers["allow"] == "GET, POST"


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer sct_wrong", "Basic abc", "Bearer sct_" + "é" * 46])
async def test_without_a_good_key_there_is_nothing(service: Service, header: str | None) -> None:
    headers = {b"Authorization": header.encode("latin-1")} if header else {}
    async with AsyncClient(base_url=service.client.base_url) as client:
        for method, path in (
            ("GET", "/v1/jobs"),
            ("GET", "/v1/methods"),
            ("POST", "/v1/jobs"),
            ("PUT", "/v1/secrets/hub_token"),
        ):
            response = await client.request(method, path, headers=headers)
            check(response, 401, "unauthorized")
            assert response.headers["www-authenticate"] == "Bearer"


async def test_a_large_body_is_refused_before_it_is_sent(service: Service) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", service.client.base_url.port)
    writer.write(b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 10000000\r\n\r\n{")
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    writer.close()
    assert head.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("announced", [True, False])
async def test_a_client_that_sends_a_large_body_learns_why_it_is_refused(service: Service, announced: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 100_000

    headers = {"Content-Type": "application/json", **({"Content-Length": "10000000"} if announced else {})}
    response = await service.client.post("/v1/jobs", content=pieces(), headers=headers)
    assert "1000000" in check(response, 413, "body_too_large")["detail"]
    assert (await service.client.get("/livez")).status_code == 200


async def test_a_request_keeps_a_decent_id_of_the_client(service: Service) -> None:
    response = await service.client.get("/livez", headers={"X-Request-Id": "trace-7.a_b"})
    assert response.headers["x-request-id"] == "trace-7.a_b"
    for indecent in ("a b", "a" * 65, '"}{'):
        response = await service.client.get("/livez", headers={"X-Request-Id": indecent})
        assert response.headers["x-request-id"].startswith("req_")


async def test_an_unforeseen_error_tells_its_id_and_nothing_else() -> None:
    app = FastAPI()
    errors.install(app)
    app.add_middleware(RequestContext)

    @app.get("/")
    async def broken() -> None:
        raise RuntimeError("the password is tulip")

    async with AsyncClient(transport=ASGITransport(app), base_url="http://test") as client:
        response = await client.get("/")
    check(response, 500, "internal_error")
    assert "tulip" not in response.text


async def test_a_database_that_is_away_is_a_problem_that_passes(settings: Settings) -> None:
    away = settings.model_copy(
        update={"database": settings.database.model_copy(update={"url": "postgresql+psycopg://u@127.0.0.1:1/x"})}
    )
    headers = {"Authorization": f"Bearer {keys.generate()}"}
    async with serve(away) as url, AsyncClient(base_url=url, headers=headers) as client:
        response = await client.get("/v1/jobs")
    assert check(response, 503, "service_unavailable")["retryable"] is True
    assert response.headers["retry-after"]


@pytest.mark.parametrize(
    ("method", "path", "content"),
    [
        ("POST", "/v1/jobs", "{"),
        ("POST", "/v1/jobs", '{"kind": "plant"}'),
        ("POST", "/v1/jobs?colour=red", "[]"),
        ("GET", "/v1/jobs?limit=0", ""),
        ("GET", "/v1/jobs?stauts=failed", ""),
        ("GET", "/v1/jobs/job_x?colour=red", ""),
        ("GET", "/v1/methods?colour=red", ""),
        ("GET", "/v1/models?colour=red", ""),
        ("GET", "/v1/artifacts/art_x?colour=red", ""),
        ("PUT", "/v1/secrets/hub_token", "{"),
    ],
)
async def test_a_stranger_is_told_nothing_but_that(service: Service, method: str, path: str, content: str) -> None:
    for headers in ({"Authorization": ""}, {"Authorization": "Bearer sct_unknown"}):
        given = {"Content-Type": "application/json", **headers}
        check(await service.client.request(method, path, content=content, headers=given), 401, "unauthorized")


async def test_every_route_of_the_api_wants_to_know_who_calls(service: Service) -> None:
    async with AsyncClient(base_url=service.client.base_url) as stranger:
        paths = (await stranger.get("/openapi.json")).json()["paths"]
        asked = [(method, path) for path, item in paths.items() if path.startswith("/v1/") for method in item]
        assert len(asked) > 12
        for method, path in asked:
            assert (await stranger.request(method, path)).status_code == 401, (method, path)
