"""The card and the report that travel with a model: licence, provenance, and every tensor's digest."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from secateur.pruning.provenance import licence_of, provenance_of
from tests.engine.runs import prune, recipe

CARD = """---
language: en
license: other
license_name: "llama3"
license_link: https://example.com/LICENSE
tags:
- a
---

license: mit
"""


def test_card_and_report_travel_with_the_model(llama: Path, tmp_path: Path) -> None:
    source = shutil.copytree(llama, tmp_path / "source")
    (source / "README.md").write_text(CARD)
    (source / "LICENSE").write_text("Do as you like.")
    evaluation = {"perplexity": {"sequence_length": 32, "max_windows": 2}}
    result = prune(recipe(evaluation=evaluation), source, tmp_path)
    output = tmp_path / "output"
    report: dict[str, Any] = json.loads((output / "compression_report.json").read_text())
    assert report["licence"] == {"license": "other", "license_name": "llama3", "license_link": "https://example.com/LICENSE"}
    assert (output / "LICENSE").read_text() == "Do as you like."
    card = (output / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: transformers\npipeline_tag: text-generation\nlicense: "other"\n')
    for told in ("llama3, the base model's (https://example.com/LICENSE)", "Perplexity's protocol", "## Limits"):
        assert told in card
    with safe_open(output / "model.safetensors", framework="pt") as file:
        assert set(report["tensors"]) == set(file.keys())
        for name, told in report["tensors"].items():
            tensor = file.get_tensor(name)
            raw = tensor.contiguous().numpy().tobytes()
            assert (told["sha256"], told["shape"]) == (hashlib.sha256(raw).hexdigest(), list(tensor.shape))
            if "zeros" in told:
                assert (told["zeros"], told["pattern"]) == (int((tensor == 0).sum()), "unstructured")
    assert {name for name, told in report["tensors"].items() if "zeros" in told} == {
        linear["name"] for block in result.report["blocks"] for linear in block["linears"]
    }
    provenance = report["provenance"]
    assert provenance["base_model_sha256"] == report["base_model_sha256"]
    assert provenance["evaluation_token_sha256"] == report["perplexity"]["protocol"]["token_sha256"]
    assert provenance["calibration_token_sha256"] == report["calibration"]["token_sha256"]
    digest = provenance_of(report["recipe"], inputs={})["recipe_sha256"]
    assert provenance["recipe_sha256"] == digest
    assert digest != provenance_of(report["recipe"] | {"schema_version": 2}, inputs={})["recipe_sha256"]


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (None, {}),
        ("# no metadata\nlicense: mit\n", {}),
        ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
        ("---\r\nlicense: 'mit'\r\ntags: []\r\n---\r\n", {"license": "mit"}),
        ("---\nlicense: mit\n", {}),
        ("---\nlicense: |\n  x\n---\n", {}),
        ('---\nlicense: "a\\nbase_model: evil"\n---\n', {}),
        ("---\nlicense: a`<script>\n---\n", {}),
        ("---\nnested:\n  license: mit\n---\n", {}),
        ("---\n" + "x" * 100_000 + "\nlicense: mit\n---\n", {}),
    ],
)
def test_a_licence_is_carried_over_if_the_base_models_card_names_a_decent_one(
    tmp_path: Path, card: str | None, licence: dict[str, str]
) -> None:
    if card is not None:
        (tmp_path / "README.md").write_bytes(card.encode())
    assert licence_of(tmp_path) == licence
