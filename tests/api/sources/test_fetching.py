"""What is fetched from a hub, with which token, and how often."""

from __future__ import annotations

import errno
import json
import logging
import threading
import traceback
from pathlib import Path

import pytest

from app.accounts.secrets import SecretName
from app.models.fetch import fetch_model
from app.models.hub import hub_problems
from app.settings import Settings
from secateur.problems import ProblemError
from secateur.recipes import Model
from tests.api.sources.asking import OTHER, TOKEN, admit, recipe_of, refused
from tests.hub_server import HubServer, Repository


async def test_the_token_is_the_tenants_or_none_and_stays_on_the_hub(settings: Settings, hub: HubServer) -> None:
    admitted = await admit(settings, recipe_of())
    fetch_model(admitted.model, tenant_id="ten_a", tokens={}, settings=settings)
    assert {entry.authorization for entry in hub.asked} == {None}
    hub.asked = []
    admitted = await admit(settings, recipe_of(), TOKEN)
    fetch_model(admitted.model, tenant_id="ten_b", tokens={SecretName.HUB_TOKEN: TOKEN}, settings=settings)
    assert {entry.authorization for entry in hub.asked if entry.host == "127.0.0.1"} == {f"Bearer {TOKEN}"}
    assert {entry.authorization for entry in hub.asked if entry.host == "localhost"} == {None}


async def test_no_token_reaches_a_log_or_an_exception(
    settings: Settings, hub: HubServer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    told = []
    hub.repositories["acme/tiny"].gated = True
    for token in (TOKEN, "hf_expired_secret"):
        problem = await refused(settings, recipe_of(), token)
        told.extend(traceback.format_exception(problem))
        told.append(json.dumps(problem.as_document()))
    hub.failing = 500
    with pytest.raises(ProblemError) as failed:
        fetch_model(
            Model(source="hub", id="acme/tiny", revision="0" * 40),
            tenant_id="ten_a",
            tokens={SecretName.HUB_TOKEN: TOKEN},
            settings=settings,
        )
    told.extend(traceback.format_exception(failed.value))
    told.extend([caplog.text, *capfd.readouterr()])
    assert TOKEN not in "".join(told)
    assert "hf_expired_secret" not in "".join(told)


async def test_only_weights_config_tokenizer_and_card_are_fetched(settings: Settings, hub: HubServer) -> None:
    files = hub.repositories["acme/tiny"].files
    wanted = set(files) | {"README.md"}
    files |= {"pytorch_model.bin": b"pickle", "modeling_evil.py": b"import os", "README.md": b"#", "extra.safetensors": b"x"}
    files |= {"original/consolidated.safetensors": b"y", "onnx/config.json": b"{}"}
    model = (await admit(settings, recipe_of())).model
    folder = fetch_model(model, tenant_id="ten_a", tokens={}, settings=settings)
    assert {path.name for path in folder.iterdir()} == wanted
    assert hub.fetched() == wanted
    assert all((folder / name).read_bytes() == files[name] for name in wanted)
    assert not any(path.is_symlink() for path in folder.rglob("*"))


async def test_a_sharded_model_is_fetched_whole(settings: Settings, hub: HubServer, sharded: Path) -> None:
    hub.repositories["acme/sharded"] = repository = Repository.of_folder(sharded)
    model = (await admit(settings, recipe_of("acme/sharded"))).model
    folder = fetch_model(model, tenant_id="ten_a", tokens={}, settings=settings)
    assert {path.name for path in folder.iterdir()} == set(repository.files)


async def test_each_tenant_has_a_cache_of_its_own(settings: Settings, hub: HubServer) -> None:
    hub.repositories["acme/tiny"].private = True
    hub.repositories["acme/tiny"].readers = frozenset({TOKEN})
    model = (await admit(settings, recipe_of(), TOKEN)).model
    mine = fetch_model(model, tenant_id="ten_a", tokens={SecretName.HUB_TOKEN: TOKEN}, settings=settings)
    assert mine.is_relative_to(settings.cache_folder / "ten_a")
    with pytest.raises(ProblemError) as refused:
        fetch_model(model, tenant_id="ten_b", tokens={SecretName.HUB_TOKEN: OTHER}, settings=settings)
    assert refused.value.code == "model_not_found"


async def test_what_is_there_is_not_fetched_again(settings: Settings, hub: HubServer) -> None:
    model = (await admit(settings, recipe_of())).model
    folder = fetch_model(model, tenant_id="ten_a", tokens={}, settings=settings)
    hub.asked = []
    assert fetch_model(model, tenant_id="ten_a", tokens={}, settings=settings) == folder
    assert hub.asked == []


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
async def test_a_file_that_is_not_what_the_hub_says_leaves_no_model(settings: Settings, hub: HubServer, path: str) -> None:
    repository = hub.repositories["acme/tiny"]
    model = (await admit(settings, recipe_of())).model
    repository.corrupted = {path}
    with pytest.raises(ProblemError) as corrupt:
        fetch_model(model, tenant_id="ten_a", tokens={}, settings=settings)
    assert corrupt.value.code == "model_file_corrupt"
    assert not list(settings.cache_folder.rglob(model.revision or ""))
    repository.corrupted = set()
    folder = fetch_model(model, tenant_id="ten_a", tokens={}, settings=settings)
    assert (folder / path).read_bytes() == repository.files[path]


async def test_many_that_fetch_the_same_at_once_share_the_work(settings: Settings, hub: HubServer) -> None:
    model = (await admit(settings, recipe_of())).model
    hub.asked = []
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch_model(model, tenant_id="ten_a", tokens={}, settings=settings)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert len(set(found)) == 1
    whole = [
        entry for entry in hub.asked if entry.method == "GET" and entry.path.endswith("/files/acme/tiny/model.safetensors")
    ]
    assert len(whole) == 1


def test_a_disk_that_fills_up_is_not_taken_for_a_hub_that_fails() -> None:
    with pytest.raises(ProblemError) as full, hub_problems(Model(source="hub", id="acme/tiny"), with_token=False):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert full.value.code == "disk_full"


def test_a_branch_is_never_fetched(settings: Settings) -> None:
    with pytest.raises(ProblemError, match="commit"):
        fetch_model(Model(source="hub", id="acme/tiny", revision="main"), tenant_id="ten_a", tokens={}, settings=settings)
