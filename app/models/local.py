"""Models in folders below the operator's models root."""

from __future__ import annotations

from pathlib import Path

from secateur.problems import ProblemError, at
from secateur.pruning.headers import ModelHeaders, read_model


def folder_of(model_id: str, root: Path) -> Path:
    """The folder of a local model. Raises `model_not_found` if there is none, or if a link leads out of the root."""
    root = root.resolve()
    folder = (root / model_id).resolve()
    if folder == root or not folder.is_relative_to(root) or not folder.is_dir():
        raise not_found(model_id)
    return folder


def headers_of(model_id: str, root: Path) -> ModelHeaders:
    """What the model says of itself. Raises `model_not_found`, or the problems of `headers.read_model`."""
    return read_model(folder_of(model_id, root))


def not_found(model_id: str) -> ProblemError:
    """The problem of a folder that is not there, or that the tenant may not read: the answer does not tell which."""
    return at(
        "/model/id",
        "model_not_found",
        f"There is no local model '{model_id}'.",
        hint="GET /v1/models lists the local models that can be pruned; a model of the hub needs source 'hub'.",
    )
