"""What a repository may hold, and how much of it."""

from __future__ import annotations

import asyncio
import json

import pytest

from app.models import parsing
from app.settings import Settings
from secateur.pruning.estimate import disk_bytes
from secateur.pruning.headers import ModelHeaders, Tensor
from tests.api.sources.asking import admit, pointer, recipe_of, refused, with_tensor
from tests.hub_server import HubServer


def _index(shard: str) -> dict[str, bytes | None]:
    return {"model.safetensors": None, "model.safetensors.index.json": json.dumps({"weight_map": {"a": shard}}).encode()}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        pytest.param({"model.safetensors": None}, "model_not_safetensors", id="no weights"),
        pytest.param({"model.safetensors": None, "m.gguf": b"GGUF"}, "model_not_safetensors", id="only GGUF"),
        pytest.param({"model.safetensors": b"\xff" * 4000}, "model_file_corrupt", id="garbage"),
        pytest.param({"model.safetensors": b""}, "model_file_corrupt", id="empty"),
        pytest.param({"config.json": None}, "model_config_invalid", id="no config"),
        pytest.param({"config.json": b"{"}, "model_config_invalid", id="broken config"),
        pytest.param({"config.json": b'{"auto_map": {"AutoModel": "evil.M"}}'}, "remote_code_refused", id="code"),
        pytest.param({"tokenizer_config.json": b'{"auto_map": ["evil.T"]}'}, "remote_code_refused", id="tokenizer's code"),
        pytest.param(_index("model-9.safetensors"), "model_file_corrupt", id="a shard that is not there"),
        pytest.param(_index("../../x.safetensors"), "model_file_corrupt", id="a shard elsewhere"),
    ],
)
async def test_what_a_repository_may_not_be(
    settings: Settings, hub: HubServer, change: dict[str, bytes | None], code: str
) -> None:
    files = hub.repositories["acme/tiny"].files | change
    hub.repositories["acme/tiny"].files = {path: content for path, content in files.items() if content is not None}
    problem = await refused(settings, recipe_of())
    assert (problem.code, pointer(problem)) == (code, "/model/id")


@pytest.mark.parametrize("claimed", [16_000_001, 2**40])
async def test_a_header_that_is_too_long_is_refused_by_its_length(settings: Settings, hub: HubServer, claimed: int) -> None:
    repository = hub.repositories["acme/tiny"]
    repository.files["model.safetensors"] = claimed.to_bytes(8, "little") + b"[" * 1_000_000
    repository.claimed_sizes["model.safetensors"] = 2**41
    problem = await refused(settings, recipe_of())
    assert (problem.code, pointer(problem)) == ("model_file_corrupt", "/model/id")
    assert hub.bytes_sent() < 600_000


async def test_the_headers_of_many_shards_have_one_limit(settings: Settings, hub: HubServer) -> None:
    repository = hub.repositories["acme/tiny"]
    del repository.files["model.safetensors"]
    shards = [f"model-{number}.safetensors" for number in range(40)]
    for shard in shards:
        repository.files[shard] = (500_000).to_bytes(8, "little") + b"[" * 500_000
    repository.files["model.safetensors.index.json"] = json.dumps({"weight_map": {name: name for name in shards}}).encode()
    problem = await refused(settings, recipe_of())
    assert problem.code == "model_file_corrupt"
    assert "16000000" in problem.detail


async def test_a_config_has_a_limit(settings: Settings, hub: HubServer) -> None:
    hub.repositories["acme/tiny"].files["config.json"] = b'{"a": "' + b"x" * 1_000_000 + b'"}'
    assert (await refused(settings, recipe_of())).code == "model_config_invalid"
    assert hub.bytes_sent() < 100_000


async def test_a_header_of_many_small_parts_is_not_parsed(settings: Settings, hub: HubServer) -> None:
    raw = b'{"a": [' + b",".join([b"[]"] * 2_500_000) + b"]}"
    hub.repositories["acme/tiny"].files["model.safetensors"] = len(raw).to_bytes(8, "little") + raw
    problem = await refused(settings, recipe_of())
    assert (problem.code, pointer(problem)) == ("model_file_corrupt", "/model/id")


async def test_models_are_parsed_one_at_a_time(settings: Settings) -> None:
    with parsing.one_at_a_time:
        waiting = asyncio.create_task(admit(settings, recipe_of()))
        assert await asyncio.wait({waiting}, timeout=0.5) == (set(), {waiting})
    assert (await waiting).model.revision


async def test_a_truncated_file_is_told_by_its_size(settings: Settings, hub: HubServer) -> None:
    files = hub.repositories["acme/tiny"].files
    files["model.safetensors"] = files["model.safetensors"][:-100]
    assert (await refused(settings, recipe_of())).code == "model_file_corrupt"


async def test_the_recipe_is_checked_against_the_hub_model(settings: Settings) -> None:
    problem = await refused(settings, recipe_of(sparsity={"pattern": "2:3"}))
    assert (problem.code, pointer(problem)) == ("pattern_does_not_divide", "/sparsity/pattern")


async def test_a_model_that_the_disk_cannot_hold_is_refused(settings: Settings, hub: HubServer) -> None:
    repository = hub.repositories["acme/tiny"]
    rows = 10**15 // 64
    head, size = with_tensor(repository.files["model.safetensors"], "lm_head.weight", "BF16", [rows, 64], 2 * rows * 64)
    repository.files["model.safetensors"] = head
    repository.claimed_sizes["model.safetensors"] = size
    problem = await refused(settings, recipe_of())
    assert (problem.code, pointer(problem)) == ("model_too_large_for_disk", "/model/id")


def test_the_room_is_for_blocks_files_and_what_a_local_store_keeps() -> None:
    model = ModelHeaders("safetensors", {}, {"a": Tensor("F32", (10, 10), "model.safetensors", 0, 400)})
    assert disk_bytes(recipe_of(), model, local_store=True) == 3 * 200
    assert disk_bytes(recipe_of(output={"dtype": "float32"}), model, local_store=False) == 2 * 400


def test_a_gguf_model_takes_room_for_what_it_becomes() -> None:
    model = ModelHeaders("gguf", {}, gguf_file="x.gguf", gguf_bytes=100)
    assert disk_bytes(recipe_of(), model, local_store=False) == 3 * 200
