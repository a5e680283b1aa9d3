"""`/v1/models`: what can be pruned, why not if it cannot, and what was pruned."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from app.accounts.keys import Scope
from app.models import local
from secateur.pruning.headers import ModelHeaders
from tests.api.conftest import Service
from tests.api.jobs import make_key, make_tenant
from tests.api.models import write_model
from tests.api.work import succeed


async def models(service: Service) -> dict[str, dict[str, Any]]:
    response = await service.client.get("/v1/models")
    assert response.status_code == 200, response.text
    return {model["id"]: model for model in response.json()["data"]}


async def test_a_local_model_is_described(service: Service) -> None:
    tiny = (await models(service))["tiny"]
    assert tiny["source"] == "local"
    assert tiny["architecture"] == "LlamaForCausalLM"
    assert tiny["problem"] is None
    assert tiny["bytes"] == 4 * tiny["parameters"] > 0


async def test_a_model_that_cannot_be_pruned_says_why(service: Service) -> None:
    root = service.settings.models_root
    write_model(root / "coded", auto_map={"AutoModel": "evil.Model"})
    write_model(root / "group" / "strange", architectures=["GPT2LMHeadModel"])
    broken = write_model(root / "broken")
    (broken / "model.safetensors").write_bytes(b"short")
    pickled = root / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"")
    found = await models(service)
    assert {name: model["problem"] and model["problem"]["code"] for name, model in found.items()} == {
        "broken": "model_file_corrupt",
        "coded": "remote_code_refused",
        "group/strange": "unsupported_architecture",
        "pickled": "model_not_safetensors",
        "tiny": None,
    }
    assert found["group/strange"]["architecture"] == "GPT2LMHeadModel"


async def test_a_folder_that_cannot_be_read_is_a_model_with_a_problem(service: Service) -> None:
    root = service.settings.models_root
    for name, target in (("dangling", "gone.gguf"), ("leading-out", "/etc/passwd"), ("loop", "y.gguf")):
        (root / name).mkdir()
        (root / name / "y.gguf").symlink_to(target)
    (root / "no-file" / "z.gguf").mkdir(parents=True)
    found = await models(service)
    assert {
        name: found[name]["problem"]["code"] for name in ("dangling", "leading-out", "loop", "no-file")
    } == dict.fromkeys(("dangling", "leading-out", "loop", "no-file"), "model_file_corrupt")
    assert found["tiny"]["problem"] is None


async def test_a_model_is_read_again_only_when_it_has_changed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def counted(name: str, root: Path) -> ModelHeaders:
        read.append(name)
        return headers_of(name, root)

    headers_of = local.headers_of
    monkeypatch.setattr(local, "headers_of", counted)
    folder = write_model(service.settings.models_root / "other")
    first = await models(service)
    assert await models(service) == first
    assert sorted(read) == ["other", "tiny"]
    (folder / "config.json").write_text("{")
    assert (await models(service))["other"]["problem"]["code"] == "model_config_invalid"
    assert sorted(read) == ["other", "other", "tiny"]
    shutil.rmtree(folder)
    assert set(await models(service)) == {"tiny"}


async def test_folders_that_no_recipe_can_name_are_left_out(service: Service) -> None:
    write_model(service.settings.models_root / ".hidden" / "tiny")
    write_model(service.settings.models_root / "with space")
    assert set(await models(service)) == {"tiny"}


async def test_a_pruned_model_is_the_newest_job_of_its_name(service: Service, tmp_path: Path) -> None:
    await succeed(service, tmp_path, {"model.safetensors": b"first"})
    newest = await succeed(service, tmp_path, {"model.safetensors": b"second", "config.json": b"{}"}, sparsity=0.498)
    pruned = (await models(service))["default/tiny-wanda-50"]
    assert pruned["job_id"] == newest
    assert (pruned["bytes"], pruned["sparsity"], pruned["method"]) == (8, 0.498, "wanda")
    assert pruned["base"] == {"source": "local", "id": "tiny", "revision": None}


async def test_other_tenants_see_neither(service: Service, tmp_path: Path) -> None:
    await succeed(service, tmp_path, {"model.safetensors": b"mine"})
    other = await make_tenant(service.database, "other", reads_local_models=False)
    async with service.client_with(await make_key(service.database, other, service.keyring)) as client:
        assert (await client.get("/v1/models")).json()["data"] == []


async def test_the_key_needs_the_scope(service: Service) -> None:
    key = await make_key(service.database, service.tenant, service.keyring, [Scope.JOBS_READ])
    async with service.client_with(key) as client:
        assert (await client.get("/v1/models")).json()["code"] == "forbidden"
