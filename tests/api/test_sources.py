"""Where models come from: what is admitted, what is fetched, with which token, and what is refused."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import threading
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM

from app.accounts.models import Tenant
from app.accounts.secrets import SecretName
from app.models import parsing, sources
from app.models.fetch import fetch_model
from app.models.hub import hub_problems
from app.settings import HubSettings, Settings
from secateur.problems import ProblemError
from secateur.pruning.estimate import disk_bytes
from secateur.pruning.headers import ModelHeaders, Tensor
from secateur.recipes import Model, PruneRecipe, Recipe
from tests.hub_server import HubServer, Repository, serve_hub
from tests.tiny_models import make_llama

TOKEN = "hf_the_tenants_own_token"
OTHER = "hf_of_somebody_else"


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


def _tenant(*, local: bool = True, name: str = "a") -> Tenant:
    return Tenant(id=f"ten_{name}", slug=name, reads_local_models=local, created_at=datetime.now(UTC))


def _recipe(model: str = "acme/tiny", *, source: str = "hub", revision: str | None = None, **more: Any) -> PruneRecipe:
    document = {
        "kind": "prune",
        "model": {"source": source, "id": model, "revision": revision},
        "method": {"name": "wanda"},
        "sparsity": {"target": 0.5},
        "calibration": {"samples": 2, "sequence_length": 16},
    }
    return PruneRecipe.model_validate(document | more)


async def _admit(settings: Settings, recipe: Recipe, token: str | None = None, *, tenant: Tenant | None = None) -> Recipe:
    tokens = {SecretName.HUB_TOKEN: token}
    return (await sources.admit(recipe, tenant=tenant or _tenant(), tokens=tokens, settings=settings)).recipe


async def _refused(
    settings: Settings, recipe: Recipe, token: str | None = None, *, tenant: Tenant | None = None
) -> ProblemError:
    with pytest.raises(ProblemError) as refused:
        await _admit(settings, recipe, token, tenant=tenant)
    return refused.value


def _pointer(problem: ProblemError) -> str:
    return problem.faults[0].pointer


# Admission of hub models


@pytest.mark.parametrize("revision", [None, "main", "release/v1"])
async def test_a_revision_is_resolved_to_a_commit(settings: Settings, hub: HubServer, revision: str | None) -> None:
    repository = hub.repositories["acme/tiny"]
    repository.branches["release/v1"] = repository.commit
    admitted = await _admit(settings, _recipe(revision=revision))
    assert admitted.model.revision == repository.commit
    assert await _admit(settings, admitted) == admitted


SPARE = 4_000_000


async def test_admission_reads_headers_and_no_weights(settings: Settings, hub: HubServer, sharded: Path) -> None:
    hub.repositories["acme/sharded"] = repository = Repository.of_folder(sharded)
    # Enough bytes of weights in each shard that a whole one would be noticed.
    shard = next(name for name in repository.files if name.startswith("model-"))
    repository.files[shard] = _with_tensor(repository.files[shard], "padding", "U8", [SPARE], SPARE)[0] + bytes(SPARE)
    index = json.loads(repository.files["model.safetensors.index.json"])
    index["weight_map"]["padding"] = shard
    repository.files["model.safetensors.index.json"] = json.dumps(index).encode()
    admitted = await _admit(settings, _recipe("acme/sharded"))
    assert admitted.model.revision == repository.commit
    assert hub.bytes_sent() < SPARE
    assert not (settings.cache_folder).exists()


def _with_tensor(content: bytes, name: str, dtype: str, shape: list[int], size: int) -> tuple[bytes, int]:
    """A safetensors file with one more tensor of `size` bytes, which are left out, and the size that it would have."""
    length = int.from_bytes(content[:8], "little")
    header, end = json.loads(content[8 : 8 + length]), len(content) - 8 - length
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + content[8 + length :], 8 + len(raw) + end + size


async def test_a_header_longer_than_the_first_read_is_read_whole(settings: Settings, hub: HubServer) -> None:
    repository = hub.repositories["acme/tiny"]
    content = repository.files["model.safetensors"]
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" " * 700_000
    repository.files["model.safetensors"] = len(header).to_bytes(8, "little") + header + content[8 + length :]
    admitted = await _admit(settings, _recipe())
    assert admitted.model.revision == repository.commit


async def test_a_missing_repository_says_that_it_may_be_private(settings: Settings) -> None:
    problem = await _refused(settings, _recipe("acme/none"))
    assert (problem.code, _pointer(problem)) == ("model_not_found", "/model/id")
    assert problem.hint is not None
    assert "private" in problem.hint


@pytest.mark.parametrize("model", ["a/b/c", "no--such/repo--name"])
async def test_an_id_that_no_hub_can_have_is_not_found(settings: Settings, model: str) -> None:
    problem = await _refused(settings, _recipe(model))
    assert (problem.code, _pointer(problem)) == ("model_not_found", "/model/id")


@pytest.mark.parametrize("revision", ["no-such-branch", "0" * 40])
async def test_an_unknown_revision_is_pointed_at(settings: Settings, revision: str) -> None:
    problem = await _refused(settings, _recipe(revision=revision))
    assert (problem.code, _pointer(problem)) == ("model_not_found", "/model/revision")
    assert revision in problem.detail


async def test_a_private_repository_opens_to_its_readers_only(settings: Settings, hub: HubServer) -> None:
    hub.repositories["acme/tiny"].private = True
    hub.repositories["acme/tiny"].readers = frozenset({TOKEN})
    assert (await _refused(settings, _recipe())).code == "model_not_found"
    assert (await _refused(settings, _recipe(), OTHER)).code == "model_not_found"
    assert (await _admit(settings, _recipe(), TOKEN)).model.revision


async def test_a_gated_repository_is_a_problem_of_its_own(settings: Settings, hub: HubServer) -> None:
    hub.repositories["acme/tiny"].gated = True
    hub.repositories["acme/tiny"].readers = frozenset({TOKEN})
    for token in (None, OTHER):
        problem = await _refused(settings, _recipe(), token)
        assert (problem.code, _pointer(problem)) == ("model_gated", "/model/id")
    assert (await _admit(settings, _recipe(), TOKEN)).model.revision


async def test_a_token_that_the_hub_does_not_know_is_refused(settings: Settings) -> None:
    problem = await _refused(settings, _recipe(), "hf_expired")
    assert problem.code == "hub_token_refused"


@pytest.mark.parametrize("status", [500, 503, 429])
async def test_a_hub_that_fails_is_unavailable(settings: Settings, hub: HubServer, status: int) -> None:
    hub.failing = status
    problem = await _refused(settings, _recipe())
    assert (problem.code, problem.kind.retryable) == ("hub_unavailable", True)


async def test_a_hub_that_is_away_is_unavailable(settings: Settings) -> None:
    away = settings.model_copy(update={"hub": HubSettings(endpoint="http://127.0.0.1:9", timeout_seconds=5)})
    assert (await _refused(away, _recipe())).code == "hub_unavailable"


async def test_a_hub_that_hangs_is_given_up(settings: Settings, hub: HubServer) -> None:
    hub.delay = 8
    hasty = settings.model_copy(update={"hub": HubSettings(endpoint=hub.url, timeout_seconds=0.3)})
    began = datetime.now(UTC)
    assert (await _refused(hasty, _recipe())).code == "hub_unavailable"
    assert (datetime.now(UTC) - began).total_seconds() < 6


# What a repository may hold


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
    problem = await _refused(settings, _recipe())
    assert (problem.code, _pointer(problem)) == (code, "/model/id")


@pytest.mark.parametrize("claimed", [16_000_001, 2**40])
async def test_a_header_that_is_too_long_is_refused_by_its_length(settings: Settings, hub: HubServer, claimed: int) -> None:
    repository = hub.repositories["acme/tiny"]
    repository.files["model.safetensors"] = claimed.to_bytes(8, "little") + b"[" * 1_000_000
    repository.claimed_sizes["model.safetensors"] = 2**41
    problem = await _refused(settings, _recipe())
    assert (problem.code, _pointer(problem)) == ("model_file_corrupt", "/model/id")
    assert hub.bytes_sent() < 600_000


async def test_the_headers_of_many_shards_have_one_limit(settings: Settings, hub: HubServer) -> None:
    repository = hub.repositories["acme/tiny"]
    del repository.files["model.safetensors"]
    shards = [f"model-{number}.safetensors" for number in range(40)]
    for shard in shards:
        repository.files[shard] = (500_000).to_bytes(8, "little") + b"[" * 500_000
    repository.files["model.safetensors.index.json"] = json.dumps({"weight_map": {name: name for name in shards}}).encode()
    problem = await _refused(settings, _recipe())
    assert problem.code == "model_file_corrupt"
    assert "16000000" in problem.detail


async def test_a_config_has_a_limit(settings: Settings, hub: HubServer) -> None:
    hub.repositories["acme/tiny"].files["config.json"] = b'{"a": "' + b"x" * 1_000_000 + b'"}'
    assert (await _refused(settings, _recipe())).code == "model_config_invalid"
    assert hub.bytes_sent() < 100_000


async def test_a_header_of_many_small_parts_is_not_parsed(settings: Settings, hub: HubServer) -> None:
    raw = b'{"a": [' + b",".join([b"[]"] * 2_500_000) + b"]}"
    hub.repositories["acme/tiny"].files["model.safetensors"] = len(raw).to_bytes(8, "little") + raw
    problem = await _refused(settings, _recipe())
    assert (problem.code, _pointer(problem)) == ("model_file_corrupt", "/model/id")


async def test_models_are_parsed_one_at_a_time(settings: Settings) -> None:
    with parsing.one_at_a_time:
        waiting = asyncio.create_task(_admit(settings, _recipe()))
        assert await asyncio.wait({waiting}, timeout=0.5) == (set(), {waiting})
    assert (await waiting).model.revision


async def test_a_truncated_file_is_told_by_its_size(settings: Settings, hub: HubServer) -> None:
    files = hub.repositories["acme/tiny"].files
    files["model.safetensors"] = files["model.safetensors"][:-100]
    assert (await _refused(settings, _recipe())).code == "model_file_corrupt"


async def test_the_recipe_is_checked_against_the_hub_model(settings: Settings) -> None:
    problem = await _refused(settings, _recipe(sparsity={"pattern": "2:3"}))
    assert (problem.code, _pointer(problem)) == ("pattern_does_not_divide", "/sparsity/pattern")


async def test_a_model_that_the_disk_cannot_hold_is_refused(settings: Settings, hub: HubServer) -> None:
    repository = hub.repositories["acme/tiny"]
    rows = 10**15 // 64
    head, size = _with_tensor(repository.files["model.safetensors"], "lm_head.weight", "BF16", [rows, 64], 2 * rows * 64)
    repository.files["model.safetensors"] = head
    repository.claimed_sizes["model.safetensors"] = size
    problem = await _refused(settings, _recipe())
    assert (problem.code, _pointer(problem)) == ("model_too_large_for_disk", "/model/id")


def test_the_room_is_for_blocks_files_and_what_a_local_store_keeps() -> None:
    model = ModelHeaders("safetensors", {}, {"a": Tensor("F32", (10, 10), "model.safetensors", 0, 400)})
    assert disk_bytes(_recipe(), model, local_store=True) == 3 * 200
    assert disk_bytes(_recipe(output={"dtype": "float32"}), model, local_store=False) == 2 * 400


def test_a_gguf_model_takes_room_for_what_it_becomes() -> None:
    model = ModelHeaders("gguf", {}, gguf_file="x.gguf", gguf_bytes=100)
    assert disk_bytes(_recipe(), model, local_store=False) == 3 * 200


# Tokens


async def test_the_token_is_the_tenants_or_none_and_stays_on_the_hub(settings: Settings, hub: HubServer) -> None:
    admitted = await _admit(settings, _recipe())
    fetch_model(admitted.model, tenant_id="ten_a", tokens={}, settings=settings)
    assert {entry.authorization for entry in hub.asked} == {None}
    hub.asked = []
    admitted = await _admit(settings, _recipe(), TOKEN)
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
        problem = await _refused(settings, _recipe(), token)
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


# Fetching


async def test_only_weights_config_tokenizer_and_card_are_fetched(settings: Settings, hub: HubServer) -> None:
    files = hub.repositories["acme/tiny"].files
    wanted = set(files) | {"README.md"}
    files |= {"pytorch_model.bin": b"pickle", "modeling_evil.py": b"import os", "README.md": b"#", "extra.safetensors": b"x"}
    files |= {"original/consolidated.safetensors": b"y", "onnx/config.json": b"{}"}
    model = (await _admit(settings, _recipe())).model
    folder = fetch_model(model, tenant_id="ten_a", tokens={}, settings=settings)
    assert {path.name for path in folder.iterdir()} == wanted
    assert hub.fetched() == wanted
    assert all((folder / name).read_bytes() == files[name] for name in wanted)
    assert not any(path.is_symlink() for path in folder.rglob("*"))


async def test_a_sharded_model_is_fetched_whole(settings: Settings, hub: HubServer, sharded: Path) -> None:
    hub.repositories["acme/sharded"] = repository = Repository.of_folder(sharded)
    model = (await _admit(settings, _recipe("acme/sharded"))).model
    folder = fetch_model(model, tenant_id="ten_a", tokens={}, settings=settings)
    assert {path.name for path in folder.iterdir()} == set(repository.files)


async def test_each_tenant_has_a_cache_of_its_own(settings: Settings, hub: HubServer) -> None:
    hub.repositories["acme/tiny"].private = True
    hub.repositories["acme/tiny"].readers = frozenset({TOKEN})
    model = (await _admit(settings, _recipe(), TOKEN)).model
    mine = fetch_model(model, tenant_id="ten_a", tokens={SecretName.HUB_TOKEN: TOKEN}, settings=settings)
    assert mine.is_relative_to(settings.cache_folder / "ten_a")
    with pytest.raises(ProblemError) as refused:
        fetch_model(model, tenant_id="ten_b", tokens={SecretName.HUB_TOKEN: OTHER}, settings=settings)
    assert refused.value.code == "model_not_found"


async def test_what_is_there_is_not_fetched_again(settings: Settings, hub: HubServer) -> None:
    model = (await _admit(settings, _recipe())).model
    folder = fetch_model(model, tenant_id="ten_a", tokens={}, settings=settings)
    hub.asked = []
    assert fetch_model(model, tenant_id="ten_a", tokens={}, settings=settings) == folder
    assert hub.asked == []


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
async def test_a_file_that_is_not_what_the_hub_says_leaves_no_model(settings: Settings, hub: HubServer, path: str) -> None:
    repository = hub.repositories["acme/tiny"]
    model = (await _admit(settings, _recipe())).model
    repository.corrupted = {path}
    with pytest.raises(ProblemError) as corrupt:
        fetch_model(model, tenant_id="ten_a", tokens={}, settings=settings)
    assert corrupt.value.code == "model_file_corrupt"
    assert not list(settings.cache_folder.rglob(model.revision or ""))
    repository.corrupted = set()
    folder = fetch_model(model, tenant_id="ten_a", tokens={}, settings=settings)
    assert (folder / path).read_bytes() == repository.files[path]


async def test_many_that_fetch_the_same_at_once_share_the_work(settings: Settings, hub: HubServer) -> None:
    model = (await _admit(settings, _recipe())).model
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


# Local models


@pytest.fixture
def root(settings: Settings, llama: Path) -> Path:
    settings.models_root.mkdir(parents=True)
    folder = settings.models_root / "tiny"
    folder.mkdir()
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return settings.models_root


async def test_a_local_model_is_admitted_as_it_is(settings: Settings, root: Path) -> None:
    recipe = _recipe("tiny", source="local")
    assert await _admit(settings, recipe) == recipe
    assert fetch_model(recipe.model, tenant_id="ten_a", tokens={}, settings=settings) == root / "tiny"


async def test_a_tenant_that_may_not_read_them_sees_no_local_models(settings: Settings, root: Path) -> None:
    recipe = _recipe("tiny", source="local")
    mine = await _refused(settings, recipe, tenant=_tenant(local=False))
    none = await _refused(settings, _recipe("none", source="local"))
    assert mine.code == none.code == "model_not_found"
    assert mine.detail.replace("tiny", "none") == none.detail


async def test_links_do_not_lead_out_of_the_root(settings: Settings, root: Path, llama: Path) -> None:
    (root / "linked").symlink_to(llama)
    assert (await _refused(settings, _recipe("linked", source="local"))).code == "model_not_found"
    (root / "tiny" / "model.safetensors").unlink()
    (root / "tiny" / "model.safetensors").symlink_to(llama / "model.safetensors")
    problem = await _refused(settings, _recipe("tiny", source="local"))
    assert (problem.code, _pointer(problem)) == ("model_file_corrupt", "/model/id")


async def test_the_recipe_is_checked_against_the_local_model(settings: Settings, root: Path) -> None:
    recipe = _recipe("tiny", source="local", calibration={"samples": 1, "sequence_length": 1024})
    problem = await _refused(settings, recipe)
    assert (problem.code, _pointer(problem)) == ("sequence_too_long", "/calibration/sequence_length")
