"""The command line against the real service, as a user's shell runs it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from app.accounts.secrets import SecretName, secret_of
from app.jobs import claims
from app.kit import clock
from secateur.problems import ProblemError
from tests.api.conftest import Service
from tests.api.jobs import body, make_job
from tests.api.work import claim, fail, succeed
from tests.servers import running

FILES = {"model.safetensors": b"w" * 70_000, "config.json": b"{}"}


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Awaitable[Ran]]


@pytest.fixture
def database_url(sqlite_url: str) -> str:
    return sqlite_url


@pytest.fixture
def run(service: Service, tmp_path: Path) -> Run:
    """Runs `secateur` in a folder of its own, with the service's address and key in the environment."""
    here = tmp_path / "here"
    here.mkdir()
    key = str(service.client.headers["authorization"]).removeprefix("Bearer ")
    environment = {**os.environ, "SECATEUR_URL": str(service.client.base_url), "SECATEUR_API_KEY": key, "COLUMNS": "200"}

    async def run(*arguments: str, stdin: str = "", **more: str) -> Ran:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "secateur.cli", *arguments, cwd=here, env=environment | more,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate(stdin.encode())
        return Ran(process.returncode or 0, out.decode(), err.decode())

    return run


async def test_flags_become_the_recipe(run: Run) -> None:
    ran = await run(
        "submit", "tiny", "--method", "sparsegpt", "--param", "damping=0.02", "--pattern", "2:4", "--samples", "2",
        "--sequence-length", "16", "--seed", "7", "--window-length", "32", "--max-windows", "3", "--name", "mine",
        "--dtype", "float32", "--metadata", "team=search", "--priority", "3", "--max-runtime", "60", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    recipe = ran.json["recipe"]
    assert recipe["model"] == {"source": "local", "id": "tiny", "revision": None}
    method = recipe["method"]
    assert (method["name"], method["damping"], method["block_size"]) == ("sparsegpt", 0.02, 128)
    assert (recipe["sparsity"]["pattern"], recipe["sparsity"]["target"]) == ("2:4", 0.5)
    assert recipe["calibration"] == {"dataset": "wikitext2-sample", "samples": 2, "sequence_length": 16, "seed": 7}
    assert recipe["evaluation"]["perplexity"] == {"dataset": "wikitext2-sample", "sequence_length": 32, "max_windows": 3}
    assert (recipe["output"]["name"], recipe["output"]["dtype"], recipe["metadata"]) == (
        "mine",
        "float32",
        {"team": "search"},
    )
    assert recipe["schedule"] == {"priority": 3, "start_deadline": None, "max_runtime": 60}


async def test_without_flags_it_is_wanda_at_a_half_and_no_evaluation(run: Run) -> None:
    ran = await run("submit", "tiny", "--samples", "2", "--sequence-length", "16", "--json")
    recipe = ran.json["recipe"]
    assert (recipe["method"]["name"], recipe["sparsity"]["target"]) == ("wanda", 0.5)
    assert recipe["evaluation"] == {"perplexity": None}


async def test_a_job_is_estimated_and_not_submitted(run: Run) -> None:
    asked = ["estimate", "tiny", "--method", "sparsegpt", "--samples", "2", "--sequence-length", "16"]
    told = await run(*asked)
    assert told.code == 0, told.err
    assert re.search(r"^time +.* to .*a default: no job has measured it yet", told.out, re.MULTILINE)
    assert (await run(*asked, "--json")).json["tokens"] == {"calibration": 32, "evaluation": 0}
    assert (await run("jobs", "--json")).json == []


async def test_a_model_is_evaluated_by_name_or_by_the_job_that_made_it(run: Run) -> None:
    ran = await run("evaluate", "tiny", "--window-length", "64", "--max-windows", "3", "--json")
    assert (ran.json["kind"], ran.json["recipe"]["evaluation"]["perplexity"]["max_windows"]) == ("evaluate", 3)
    assert "job_0" in (await run("evaluate", "job_0")).err
    assert "evaluate" in (await run("jobs")).out


async def test_a_sweep_is_submitted_listed_shown_and_cancelled(run: Run, service: Service, tmp_path: Path) -> None:
    settings = ["--samples", "2", "--sequence-length", "16"]
    many = ["--method", "wanda", "--method", "ria", "--sparsity", "0.5", "--pattern", "2:4"]
    made = await run("sweep", "tiny", *many, *settings, "--json")
    assert made.code == 0, made.err
    assert [(row["method"]["name"], row["pattern"]) for row in made.json["table"]] == [
        (method, pattern) for method in ("wanda", "ria") for pattern in ("unstructured", "2:4")
    ]
    assert "queued, 0/4 jobs" in (await run("sweeps")).out
    table = (await run("sweeps", made.json["id"])).out
    assert all(row["job_id"] in table for row in made.json["table"])
    assert "is cancelled" in (await run("cancel", made.json["id"])).out
    assert "give the model" in (await run("sweep")).err


async def test_a_recipe_is_read_from_a_file_or_the_input(run: Run, tmp_path: Path) -> None:
    document = json.dumps(body(output={"name": "from-file"}))
    (tmp_path / "recipe.json").write_text(document)
    for arguments, stdin in ((str(tmp_path / "recipe.json"), ""), ("-", document)):
        ran = await run("submit", "--recipe", arguments, "--json", stdin=stdin)
        assert ran.json["repository"] == "default/from-file"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["submit"], "give the model"),
        (["submit", "--recipe", "none.json"], "cannot be read"),
        (["submit", "--recipe", "-", "--sparsity", "0.7"], "leave out what else was given of its sparsity"),
        (["submit", "tiny", "--param", "damping"], "NAME=VALUE"),
        (["prune-it"], "No such command"),
    ],
)
async def test_wrong_usage_exits_with_2(run: Run, arguments: list[str], told: str) -> None:
    ran = await run(*arguments)
    assert ran.code == 2
    assert told in ran.err.replace("\n", " ")


async def test_a_problem_is_a_sentence_with_a_place_and_a_hint(run: Run) -> None:
    ran = await run("submit", "none")
    assert ran.code == 1
    assert "There is no local model 'none'. (model_not_found)" in ran.err
    assert "at /model/id" in ran.err
    assert "GET /v1/models" in ran.err
    assert ran.out == ""
    ran = await run("submit", "tiny", "--pattern", "5:4")
    assert "at /sparsity/pattern" in ran.err


async def test_no_service_is_told_with_what_to_do(run: Run) -> None:
    ran = await run("jobs", SECATEUR_URL="", SECATEUR_API_KEY="")
    assert ran.code == 1
    assert "secateur up" in ran.err
    ran = await run("--url", "http://127.0.0.1:9", "jobs")
    assert "cannot be reached" in ran.err


async def test_the_state_folder_names_the_service(run: Run, service: Service, tmp_path: Path) -> None:
    state = tmp_path / "embedded"
    state.mkdir()
    (state / "admin.key").write_text(str(service.client.headers["authorization"]).removeprefix("Bearer "))
    document = {"url": str(service.client.base_url), "key_file": str(state / "admin.key")}
    (state / "service.json").write_text(json.dumps(document))
    with running(state):
        ran = await run("--state", str(state), "jobs", "--json", SECATEUR_URL="", SECATEUR_API_KEY="")
    assert (ran.code, ran.json) == (0, [])


async def test_the_hub_token_is_read_from_the_input_and_never_shown(run: Run, service: Service) -> None:
    ran = await run("hub-token", stdin="hf_secret\n")
    assert ran.code == 0, ran.err
    assert "hf_secret" not in ran.out + ran.err
    async with service.database.read() as session:
        assert await secret_of(session, service.tenant.id, SecretName.HUB_TOKEN, keyring=service.keyring) == "hf_secret"
    await run("hub-token", "--forget")
    async with service.database.read() as session:
        assert await secret_of(session, service.tenant.id, SecretName.HUB_TOKEN, keyring=service.keyring) is None


async def test_watch_tells_lines_and_ends_with_the_job(run: Run, service: Service) -> None:
    job = await make_job(service.database, service.tenant)

    async def work() -> None:
        await asyncio.sleep(0.8)
        attempt = (await claim(service)).attempt
        progress = {"done": 1, "total": 2, "unit": "blocks", "eta_seconds": 75.0}
        async with service.database.write() as session:
            await claims.record(session, job.id, attempt, stage="pruning", progress=progress, logs=[], at=clock.now())
        await asyncio.sleep(0.8)
        metrics = {"sparsity": 0.5, "perplexity": {"dense": 23.94, "pruned": 41.2}, "seconds": {"total": 61}}
        results: dict[str, Any] = {"metrics": metrics, "report": {}, "artifacts": []}
        async with service.database.write() as session:
            await claims.succeed(session, job.id, attempt, **results, at=clock.now())

    people, program, _ = await asyncio.gather(run("watch", job.id), run("watch", job.id, "--json"), work())
    assert people.code == program.code == 0
    assert "pruning, 1/2 blocks, about 1 min 15 s left" in people.out
    assert f"{job.id} succeeded, sparsity 0.5, perplexity 23.94 -> 41.20, 1 min 1 s" in people.out
    assert f"secateur download {job.id}" in people.out
    assert [json.loads(line)["status"] for line in program.out.splitlines()][-1] == "succeeded"


async def test_watch_of_a_failed_job_tells_why_and_exits_with_1(run: Run, service: Service) -> None:
    error = ProblemError("disk_full", "the disk is full", hint="Free some space, then retry.").as_document()
    ran = await run("watch", await fail(service, error))
    assert ran.code == 1
    assert "The disk is full (disk_full)" in ran.err
    assert "Free some space" in ran.err


async def test_download_into_a_folder_of_the_models_name(run: Run, service: Service, tmp_path: Path) -> None:
    job_id = await succeed(service, tmp_path, FILES)
    ran = await run("download", job_id)
    folder = tmp_path / "here" / "tiny-wanda-50"
    assert ran.code == 0, ran.err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    ran = await run("download", job_id, "--into", "there", "--file", "config.json", "--json")
    assert ran.json == {"folder": "there"}
    assert [path.name for path in (tmp_path / "here" / "there").iterdir()] == ["config.json"]


async def test_jobs_are_listed_cancelled_and_retried(run: Run, service: Service) -> None:
    jobs = [(await make_job(service.database, service.tenant)).id for _ in range(3)]
    ran = await run("jobs", "--limit", "2", "--json")
    assert [job["id"] for job in ran.json] == jobs[:0:-1]
    assert "cancelled" in (await run("cancel", jobs[0])).out
    again = (await run("retry", jobs[0], "--json")).json
    assert again["retry_of"] == jobs[0]
    table = (await run("jobs", "--status", "cancelled")).out
    assert jobs[0] in table
    assert "wanda 0.5" in table
    assert jobs[1] not in table
    assert (await run("cancel", "job_none")).code == 1
    assert "deleted" in (await run("delete", jobs[0])).out
    assert (await run("delete", "job_none")).code == 1


async def test_methods_and_models_are_listed(run: Run, service: Service, tmp_path: Path) -> None:
    await succeed(service, tmp_path, FILES, sparsity=0.4999)
    assert {"wanda", "sparsegpt"} <= {method["name"] for method in (await run("methods", "--json")).json}
    assert "2306.11695" in (await run("methods")).out
    assert {model["id"] for model in (await run("models", "--json")).json} == {"tiny", "default/tiny-wanda-50"}
    table = (await run("models")).out
    assert "LlamaForCausalLM" in table
    assert "sparsity 0.4999" in table
