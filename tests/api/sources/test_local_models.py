"""Models in a folder of the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.models.fetch import fetch_model
from app.settings import Settings
from tests.api.sources.asking import admit, pointer, recipe_of, refused, tenant_of


@pytest.fixture
def root(settings: Settings, llama: Path) -> Path:
    settings.models_root.mkdir(parents=True)
    folder = settings.models_root / "tiny"
    folder.mkdir()
    for file in llama.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return settings.models_root


async def test_a_local_model_is_admitted_as_it_is(settings: Settings, root: Path) -> None:
    recipe = recipe_of("tiny", source="local")
    assert await admit(settings, recipe) == recipe
    assert fetch_model(recipe.model, tenant_id="ten_a", tokens={}, settings=settings) == root / "tiny"


async def test_a_tenant_that_may_not_read_them_sees_no_local_models(settings: Settings, root: Path) -> None:
    recipe = recipe_of("tiny", source="local")
    mine = await refused(settings, recipe, tenant=tenant_of(local=False))
    none = await refused(settings, recipe_of("none", source="local"))
    assert mine.code == none.code == "model_not_found"
    assert mine.detail.replace("tiny", "none") == none.detail


async def test_links_do_not_lead_out_of_the_root(settings: Settings, root: Path, llama: Path) -> None:
    (root / "linked").symlink_to(llama)
    assert (await refused(settings, recipe_of("linked", source="local"))).code == "model_not_found"
    (root / "tiny" / "model.safetensors").unlink()
    (root / "tiny" / "model.safetensors").symlink_to(llama / "model.safetensors")
    problem = await refused(settings, recipe_of("tiny", source="local"))
    assert (problem.code, pointer(problem)) == ("model_file_corrupt", "/model/id")


async def test_the_recipe_is_checked_against_the_local_model(settings: Settings, root: Path) -> None:
    recipe = recipe_of("tiny", source="local", calibration={"samples": 1, "sequence_length": 1024})
    problem = await refused(settings, recipe)
    assert (problem.code, pointer(problem)) == ("sequence_too_long", "/calibration/sequence_length")
