"""Jobs on hub models through the whole service, against a hub on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.errors import ForbiddenError
from secateur.schemas.jobs import Status
from tests.hub_server import HubServer, Repository, serve_hub
from tests.service.conftest import Service, recipe, up

TOKEN = "hf_of_the_tenant"


@pytest.fixture(scope="module")
def hub(models: Path) -> Iterator[HubServer]:
    with serve_hub() as server:
        server.tokens = {TOKEN}
        server.repositories["acme/tiny"] = Repository.of_folder(models / "tiny")
        server.repositories["acme/gated"] = Repository.of_folder(models / "tiny", gated=True, readers=frozenset({TOKEN}))
        yield server


@pytest.fixture(scope="module")
def service_with_hub(hub: HubServer, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    environment = {"SECATEUR_HUB_ENDPOINT": hub.url, "HF_TOKEN": "hf_of_the_machine"}
    with up(tmp_path_factory.mktemp("state"), models, **environment) as running:
        yield running


def test_a_hub_model_is_pruned_at_the_commit_that_the_job_records(service_with_hub: Service, hub: HubServer) -> None:
    client = service_with_hub.client
    job = client.jobs.create(recipe() | {"model": {"source": "hub", "id": "acme/tiny", "revision": "main"}})
    assert job.recipe.model.revision == hub.repositories["acme/tiny"].commit
    ended = service_with_hub.finish(job.id)
    assert ended.status == Status.SUCCEEDED, ended.error
    local = service_with_hub.finish(client.jobs.create(recipe()).id)
    hub_weights, local_weights = (
        {one.name: one.sha256 for one in job.artifacts}["model.safetensors"] for job in (ended, local)
    )
    assert hub_weights == local_weights
    assert {entry.authorization for entry in hub.asked} == {None}


def test_a_gated_model_needs_the_tenants_token(service_with_hub: Service) -> None:
    wanted = recipe() | {"model": {"source": "hub", "id": "acme/gated"}}
    client = service_with_hub.client
    with pytest.raises(ForbiddenError) as refused:
        client.jobs.create(wanted)
    assert refused.value.code == "model_gated"
    assert not [job for job in client.jobs.list() if job.recipe.model.id == "acme/gated"]
    client.set_hub_token(TOKEN)
    ended = service_with_hub.finish(client.jobs.create(wanted).id)
    assert ended.status == Status.SUCCEEDED, ended.error
    service_with_hub.let_go(ended.id)
    for file in (file for file in service_with_hub.state.rglob("*") if file.is_file()):
        assert TOKEN.encode() not in file.read_bytes(), f"the token lies open in {file}"
