"""Which models of a hub are admitted: of which revision, to whom, and what a hub in trouble is called."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from app.settings import HubSettings, Settings
from tests.api.sources.asking import OTHER, TOKEN, admit, pointer, recipe_of, refused, with_tensor
from tests.hub_server import HubServer, Repository


@pytest.mark.parametrize("revision", [None, "main", "release/v1"])
async def test_a_revision_is_resolved_to_a_commit(settings: Settings, hub: HubServer, revision: str | None) -> None:
    repository = hub.repositories["acme/tiny"]
    repository.branches["release/v1"] = repository.commit
    admitted = await admit(settings, recipe_of(revision=revision))
    assert admitted.model.revision == repository.commit
    assert await admit(settings, admitted) == admitted


SPARE = 4_000_000


async def test_admission_reads_headers_and_no_weights(settings: Settings, hub: HubServer, sharded: Path) -> None:
    hub.repositories["acme/sharded"] = repository = Repository.of_folder(sharded)
    # Enough bytes of weights in each shard that a whole one would be noticed.
    shard = next(name for name in repository.files if name.startswith("model-"))
    repository.files[shard] = with_tensor(repository.files[shard], "padding", "U8", [SPARE], SPARE)[0] + bytes(SPARE)
    index = json.loads(repository.files["model.safetensors.index.json"])
    index["weight_map"]["padding"] = shard
    repository.files["model.safetensors.index.json"] = json.dumps(index).encode()
    admitted = await admit(settings, recipe_of("acme/sharded"))
    assert admitted.model.revision == repository.commit
    assert hub.bytes_sent() < SPARE
    assert not (settings.cache_folder).exists()


async def test_a_header_longer_than_the_first_read_is_read_whole(settings: Settings, hub: HubServer) -> None:
    repository = hub.repositories["acme/tiny"]
    content = repository.files["model.safetensors"]
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" " * 700_000
    repository.files["model.safetensors"] = len(header).to_bytes(8, "little") + header + content[8 + length :]
    admitted = await admit(settings, recipe_of())
    assert admitted.model.revision == repository.commit


async def test_a_missing_repository_says_that_it_may_be_private(settings: Settings) -> None:
    problem = await refused(settings, recipe_of("acme/none"))
    assert (problem.code, pointer(problem)) == ("model_not_found", "/model/id")
    assert problem.hint is not None
    assert "private" in problem.hint


@pytest.mark.parametrize("model", ["a/b/c", "no--such/repo--name"])
async def test_an_id_that_no_hub_can_have_is_not_found(settings: Settings, model: str) -> None:
    problem = await refused(settings, recipe_of(model))
    assert (problem.code, pointer(problem)) == ("model_not_found", "/model/id")


@pytest.mark.parametrize("revision", ["no-such-branch", "0" * 40])
async def test_an_unknown_revision_is_pointed_at(settings: Settings, revision: str) -> None:
    problem = await refused(settings, recipe_of(revision=revision))
    assert (problem.code, pointer(problem)) == ("model_not_found", "/model/revision")
    assert revision in problem.detail


async def test_a_private_repository_opens_to_its_readers_only(settings: Settings, hub: HubServer) -> None:
    hub.repositories["acme/tiny"].private = True
    hub.repositories["acme/tiny"].readers = frozenset({TOKEN})
    assert (await refused(settings, recipe_of())).code == "model_not_found"
    assert (await refused(settings, recipe_of(), OTHER)).code == "model_not_found"
    assert (await admit(settings, recipe_of(), TOKEN)).model.revision


async def test_a_gated_repository_is_a_problem_of_its_own(settings: Settings, hub: HubServer) -> None:
    hub.repositories["acme/tiny"].gated = True
    hub.repositories["acme/tiny"].readers = frozenset({TOKEN})
    for token in (None, OTHER):
        problem = await refused(settings, recipe_of(), token)
        assert (problem.code, pointer(problem)) == ("model_gated", "/model/id")
    assert (await admit(settings, recipe_of(), TOKEN)).model.revision


async def test_a_token_that_the_hub_does_not_know_is_refused(settings: Settings) -> None:
    problem = await refused(settings, recipe_of(), "hf_expired")
    assert problem.code == "hub_token_refused"


@pytest.mark.parametrize("status", [500, 503, 429])
async def test_a_hub_that_fails_is_unavailable(settings: Settings, hub: HubServer, status: int) -> None:
    hub.failing = status
    problem = await refused(settings, recipe_of())
    assert (problem.code, problem.kind.retryable) == ("hub_unavailable", True)


async def test_a_hub_that_is_away_is_unavailable(settings: Settings) -> None:
    away = settings.model_copy(update={"hub": HubSettings(endpoint="http://127.0.0.1:9", timeout_seconds=5)})
    assert (await refused(away, recipe_of())).code == "hub_unavailable"


async def test_a_hub_that_hangs_is_given_up(settings: Settings, hub: HubServer) -> None:
    hub.delay = 8
    hasty = settings.model_copy(update={"hub": HubSettings(endpoint=hub.url, timeout_seconds=0.3)})
    began = datetime.now(UTC)
    assert (await refused(hasty, recipe_of())).code == "hub_unavailable"
    assert (datetime.now(UTC) - began).total_seconds() < 6
