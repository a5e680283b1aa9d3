"""What a recipe takes, fills in and refuses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from secateur.recipes import EvaluateRecipe, PruneRecipe, read_model_recipe, read_recipe


def recipe(**changes: Any) -> PruneRecipe:
    return PruneRecipe.model_validate(
        {
            "kind": "prune",
            "model": {"source": "local", "id": "smollm2-135m"},
            "method": {"name": "wanda"},
            "sparsity": {"target": 0.5},
        }
        | changes
    )


def test_defaults_are_filled_in() -> None:
    made = recipe()
    assert made.schema_version == 1
    assert (made.calibration.dataset, made.calibration.seed) == ("wikitext2-sample", 0)
    assert (made.output.dtype, made.output.formats) == ("bfloat16", ["safetensors"])
    assert PruneRecipe.model_validate_json(made.model_dump_json()) == made


@pytest.mark.parametrize(("pattern", "target"), [("2:4", 0.5), ("1:4", 0.75), ("31:32", 1 / 32), ("02:4", 0.5)])
def test_a_pattern_implies_its_target(pattern: str, target: float) -> None:
    made = recipe(sparsity={"pattern": pattern})
    assert made.sparsity.target == pytest.approx(target)
    assert made.sparsity.group is not None
    assert made.sparsity == recipe(sparsity={"pattern": pattern, "target": target}).sparsity


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"sparsity": {}}, "sparsity.target"),
        ({"sparsity": {"target": 0}}, "sparsity.target"),
        ({"sparsity": {"target": 1}}, "sparsity.target"),
        ({"sparsity": {"target": float("nan")}}, "sparsity.target"),
        ({"sparsity": {"pattern": "2:4", "target": 0.6}}, "sparsity.target"),
        ({"sparsity": {"pattern": "5:4"}}, "sparsity.pattern"),
        ({"sparsity": {"pattern": "4:4"}}, "sparsity.pattern"),
        ({"sparsity": {"pattern": "0:4"}}, "sparsity.pattern"),
        ({"sparsity": {"pattern": "1:33"}}, "sparsity.pattern"),
        ({"sparsity": {"pattern": "half", "target": 0.5}}, "sparsity.pattern"),
        ({"method": {"name": "scissors"}}, "method"),
        ({"method": {"name": "wanda", "damping": 0.1}}, "method.wanda.damping"),
        ({"method": {"name": "sparsegpt", "block_size": 0}}, "method.sparsegpt.block_size"),
        ({"model": {"source": "local", "id": "../etc"}}, "model.id"),
        ({"model": {"source": "local", "id": "/etc"}}, "model.id"),
        ({"model": {"source": "local", "id": "a", "revision": "main"}}, "model"),
        ({"calibration": {"samples": 0}}, "calibration.samples"),
        ({"calibration": {"dataset": "pile"}}, "calibration.dataset"),
        ({"output": {"name": "-a"}}, "output.name"),
        ({"output": {"dtype": "int8"}}, "output.dtype"),
        ({"outptu": {}}, "outptu"),
        ({"schema_version": 2}, "schema_version"),
    ],
)
def test_what_is_wrong_is_found_where_it_is(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError) as caught:
        recipe(**changes)
    assert [".".join(map(str, error["loc"])) for error in caught.value.errors()] == [where]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "smollm2-135m-wanda-50"),
        ({"sparsity": {"target": 0.625}}, "smollm2-135m-wanda-62_5"),
        ({"method": {"name": "sparsegpt"}, "sparsity": {"pattern": "2:4"}}, "smollm2-135m-sparsegpt-2-4"),
        ({"model": {"source": "hub", "id": "owner/Model--7B"}}, "Model-7B-wanda-50"),
        ({"output": {"name": "mine"}}, "mine"),
    ],
)
def test_the_output_has_a_name(changes: dict[str, Any], name: str) -> None:
    assert recipe(**changes).name == name


def test_a_long_name_keeps_its_tail() -> None:
    made = recipe(model={"source": "local", "id": "m" * 200})
    assert len(made.name) == 96
    assert made.name.endswith("-wanda-50")


EVALUATE = {"kind": "evaluate", "model": {"source": "local", "id": "smollm2-135m"}}


def test_a_document_is_read_as_the_kind_that_it_names() -> None:
    evaluate = read_recipe(EVALUATE)
    assert isinstance(evaluate, EvaluateRecipe)
    assert evaluate.evaluation.perplexity is not None
    for made in (evaluate, recipe()):
        assert read_recipe(made.model_dump(mode="json")) == made


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"kind": "prnue"}, ""),
        ({"method": {"name": "wanda"}}, "evaluate.method"),
        ({"output": {}}, "evaluate.output"),
        ({"evaluation": {}}, "evaluate.evaluation"),
        ({"evaluation": {"perplexity": None}}, "evaluate.evaluation"),
        ({"schema_version": 2}, "evaluate.schema_version"),
    ],
)
def test_a_kind_has_its_own_fields_and_no_others(changes: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError) as caught:
        read_recipe(EVALUATE | changes)
    assert [".".join(map(str, error["loc"])) for error in caught.value.errors()] == [where]


def test_only_a_kind_that_writes_a_model_has_one() -> None:
    assert read_model_recipe(recipe().model_dump(mode="json")).name == "smollm2-135m-wanda-50"
    with pytest.raises(TypeError, match="evaluate"):
        read_model_recipe(EVALUATE)
