"""The methods as the service lists them."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import TypeAdapter

from secateur.pruning.registry import METHODS, MethodCard, methods
from secateur.recipes import Method


def test_every_method_of_the_recipe_has_a_card_and_no_other() -> None:
    mapping = TypeAdapter(Method).json_schema()["discriminator"]["mapping"]
    assert set(mapping) == {card.name for card in methods() if card.kind == "prune"} == set(METHODS)


@pytest.mark.parametrize("card", methods(), ids=lambda card: card.name)
def test_parameters_are_those_that_stand_beside_the_name(card: MethodCard) -> None:
    schema = card.parameters_schema()
    assert "name" not in schema["properties"]
    assert schema["properties"]
    assert schema["additionalProperties"] is False
    assert schema["required"] == []


@pytest.mark.parametrize("card", METHODS.values(), ids=lambda card: card.name)
def test_the_code_of_a_method_is_there(card: MethodCard) -> None:
    assert {"prepare", "prune"} <= set(dir(card.load()))


def test_what_the_service_needs_is_free_of_torch() -> None:
    modules = "admission, datasets, discovery, families, headers, linears, registry"
    heavy = "{'torch', 'transformers', 'safetensors', 'numpy', 'datasets', 'pandas'}"
    program = f"import sys; from secateur.pruning import {modules}; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout == "[]\n"
