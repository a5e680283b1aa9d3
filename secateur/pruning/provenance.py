"""Where a pruned model comes from and what it is, byte for byte: licence, inputs, code, and a digest of every tensor."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from secateur import __version__
from secateur.pruning.headers import read_model
from secateur.recipes import ModelRecipe

CARD = "README.md"
_CARD_BYTES = 64 << 10  # of a card, its metadata stand at the beginning
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*(?:\r?\n|\Z)", re.DOTALL)
# One line each, of plain characters: a card is hostile input, and what is carried over is written into our own.
_LICENCE_LINE = re.compile(
    r"^(license|license_name|license_link): *([\"']?)([\w.\-/:+ ]{1,200})\2 *\r?$", re.MULTILINE | re.ASCII
)
_SOFTWARE = ("torch", "transformers", "safetensors")
_PIECE_BYTES = 1 << 20


def licence_of(folder: Path) -> dict[str, str]:
    """What the card of the model in `folder` says of its licence: `license`, `license_name`, `license_link`, if it does."""
    card = folder / CARD
    if not card.is_file():
        return {}
    with card.open("rb") as file:
        text = file.read(_CARD_BYTES).decode("utf-8", "replace")
    matter = _FRONT_MATTER.match(text)
    return {line[1]: line[3].strip() for line in _LICENCE_LINE.finditer(matter[1])} if matter else {}


def provenance_of(recipe: Mapping[str, Any], *, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The digests of all that went in (`recipe` as the report tells it), and the versions of the code that read it."""
    canonical = json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return {
        "recipe_sha256": hashlib.sha256(canonical.encode()).hexdigest(),
        **{name: digest for name, digest in inputs.items() if digest},
        "software": {"secateur": __version__, **{name: found for name in _SOFTWARE if (found := _version_of(name))}},
    }


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def tensors_of(folder: Path, recipe: ModelRecipe, zeros_of: Mapping[str, int]) -> dict[str, Any]:
    """Each tensor of the model in `folder`: shape, dtype, file and SHA-256 of its bytes; of a pruned one zeros and pattern.

    Raises the problems of `headers.read_model`.
    """
    told: dict[str, Any] = {}
    for name, tensor in sorted(read_model(folder).tensors.items()):
        digest, left = hashlib.sha256(), tensor.end - tensor.start
        with (folder / tensor.file).open("rb") as file:
            file.seek(tensor.start)
            while left and (piece := file.read(min(left, _PIECE_BYTES))):
                digest.update(piece)
                left -= len(piece)
        told[name] = {"shape": list(tensor.shape), "dtype": tensor.dtype, "file": tensor.file, "sha256": digest.hexdigest()}
        if name in zeros_of:
            told[name] |= {"zeros": zeros_of[name], "pattern": recipe.pattern}
    return told
