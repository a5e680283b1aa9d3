"""What a job may ask to be done with its output, who does it, and what is written afterwards. The places themselves are
visited in `tests/service/test_integrations.py`."""

from __future__ import annotations

import re
import sys
import types
from datetime import timedelta
from pathlib import Path

import pytest

from app.integrations import registry, repository
from app.integrations.models import JobIntegration
from app.integrations.protocol import Integration
from app.kit import clock
from app.settings import IntegrationsSettings, MlflowSettings, Settings
from secateur.problems import ProblemError
from secateur.recipes import ModelRecipe, PruneRecipe
from tests.api.conftest import Service
from tests.api.jobs import body, make_job
from tests.api.work import succeed

LEASE = timedelta(seconds=30)
PUSH = {"name": "hub_push", "repository": "acme/tiny"}
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "integrations.md"


def recipe(**changes: object) -> PruneRecipe:
    return PruneRecipe.model_validate(body(**changes))


def settled(wanted: PruneRecipe, settings: Settings) -> list[str]:
    found = registry.settle(wanted, settings)
    assert isinstance(found, ModelRecipe)
    return [one.name for one in found.integrations or []]


async def test_the_list_says_what_there_is_and_what_cannot_be_used_here(service: Service) -> None:
    listed = (await service.client.get("/v1/integrations")).json()["data"]
    found = {one["name"]: one for one in listed}
    assert set(found) == {"mlflow", "hub_push"}
    assert "repository" in found["hub_push"]["options"]["properties"]
    assert (found["hub_push"]["secret"], found["hub_push"]["unavailable"]) == ("hub_token", None)
    assert "SECATEUR_MLFLOW_URL" in found["mlflow"]["unavailable"]


async def test_a_job_shows_its_integrations_with_all_their_options_from_the_beginning(service: Service) -> None:
    job = (await service.client.post("/v1/jobs", json=body(integrations=[PUSH]))).json()
    assert job["recipe"]["integrations"] == [{**PUSH, "private": True, "branch": "main"}]
    (shown,) = job["integrations"]
    assert (shown["name"], shown["status"], shown["attempts"]) == ("hub_push", "waiting", 0)
    await service.client.post(f"/v1/jobs/{job['id']}/cancel")
    assert (await service.client.get(f"/v1/jobs/{job['id']}")).json()["integrations"][0]["status"] == "skipped"
    async with service.database.write() as session:
        assert await repository.claim(session, lease=LEASE, at=clock.now()) is None


def test_the_installations_default_is_for_jobs_that_name_none(tmp_path: Path) -> None:
    settings = Settings(state=tmp_path, integrations=IntegrationsSettings(default=(PUSH,)))
    assert settled(recipe(), settings) == ["hub_push"]
    assert settled(recipe(integrations=[]), settings) == []


def test_what_cannot_be_used_here_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProblemError) as refused:
        registry.settle(recipe(integrations=[{"name": "mlflow"}]), Settings(state=tmp_path))
    assert (refused.value.code, refused.value.faults[0].pointer) == ("integration_unavailable", "/integrations/0/name")
    settings = Settings(state=tmp_path, mlflow=MlflowSettings(url="http://127.0.0.1:1"))
    assert settled(recipe(integrations=[{"name": "mlflow"}]), settings) == ["mlflow"]


async def test_a_try_is_claimed_once_and_again_when_its_lease_is_over_and_the_first_one_is_fenced(
    service: Service, tmp_path: Path
) -> None:
    job_id = await succeed(service, tmp_path, {})
    at = clock.now()
    async with service.database.write() as session:
        session.add(JobIntegration(job_id=job_id, position=0, name="hub_push", options=PUSH, status="pending", due_at=at))
    async with service.database.write() as session:
        first = await repository.claim(session, lease=LEASE, at=at)
        assert first is not None
    async with service.database.write() as session:
        assert await repository.claim(session, lease=LEASE, at=at + LEASE / 2) is None
        second = await repository.claim(session, lease=LEASE, at=at + LEASE)
        assert second is not None
        assert (first.attempts, second.attempts) == (1, 2)
        await session.flush()
        assert not await repository.write(session, first, status="succeeded")
        assert await repository.write(session, second, status="succeeded", url="https://x", due_at=None)
    shown = (await service.client.get(f"/v1/jobs/{job_id}")).json()["integrations"]
    assert [(one["status"], one["attempts"], one["url"]) for one in shown] == [("succeeded", 2, "https://x")]


async def test_only_a_job_of_ones_own_is_retried(service: Service) -> None:
    job = await make_job(service.database, service.tenant)
    assert (await service.client.post(f"/v1/jobs/{job.id}/integrations/retry")).status_code == 200
    assert (await service.client.post("/v1/jobs/job_of_others/integrations/retry")).status_code == 404


@pytest.mark.parametrize(
    ("model", "right"),
    [
        ({"source": "mlflow", "id": "models:/tiny/3"}, True),
        ({"source": "mlflow", "id": "models:/tiny@champion"}, True),
        ({"source": "mlflow", "id": "tiny"}, False),
        ({"source": "mlflow", "id": "models:/tiny"}, False),
        ({"source": "mlflow", "id": "models:/tiny/0"}, False),
        ({"source": "mlflow", "id": "models:/../x/1"}, False),
        ({"source": "hub", "id": "models:/tiny/3"}, False),
        ({"source": "local", "id": "tiny@champion"}, False),
    ],
)
def test_a_version_of_mlflow_is_named_in_one_way(model: dict[str, str], right: bool) -> None:
    if right:
        assert recipe(model=model).name == "tiny-wanda-50"
    else:
        with pytest.raises(ValueError, match="model"):
            recipe(model=model)


async def test_without_a_server_no_model_of_mlflow_is_found(service: Service) -> None:
    response = await service.client.post("/v1/jobs", json=body(model={"source": "mlflow", "id": "models:/tiny/3"}))
    assert (response.status_code, response.json()["code"]) == (422, "integration_unavailable")


def test_the_integration_of_the_how_to_is_one_and_is_short() -> None:
    """The example must go on to fit the protocol; only its secret is one that this version does not have."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    assert len(code.splitlines()) < 80
    module = types.ModuleType("example")
    sys.modules["example"] = module  # pydantic looks there for the annotations
    try:
        exec(code.replace("SecretName.WANDB_API_KEY", "None"), vars(module))
    finally:
        del sys.modules["example"]
    example = module.WandbLog()
    assert isinstance(example, Integration)
    assert example.options.model_validate({"project": "x"}).entity is None
    assert "wandb" in (example.unavailable(Settings()) or "")
