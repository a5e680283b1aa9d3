"""A hub with one model, and a service that knows this hub alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from app.settings import HubSettings, Settings
from tests.api.sources.asking import OTHER, TOKEN
from tests.hub_server import HubServer, Repository, serve_hub
from tests.tiny_models import make_llama


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama") / "tiny", hidden=64, intermediate=128)


@pytest.fixture(scope="module")
def sharded(llama: Path) -> Path:
    folder = llama.with_name("sharded")
    LlamaForCausalLM.from_pretrained(llama).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def hub_server() -> Iterator[HubServer]:
    with serve_hub() as server:
        yield server


@pytest.fixture
def hub(hub_server: HubServer, llama: Path) -> HubServer:
    hub_server.reset()
    hub_server.tokens = {TOKEN, OTHER}
    hub_server.repositories["acme/tiny"] = Repository.of_folder(llama)
    return hub_server


@pytest.fixture
def settings(tmp_path: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("HF_TOKEN", "hf_ambient_of_the_machine")
    return Settings(state=tmp_path / "state", hub=HubSettings(endpoint=hub.url, timeout_seconds=5))
