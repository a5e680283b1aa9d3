"""What tests of the engine share: small recipes, and the engine's entry with its folders filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.pruning.checkpoint import Checkpoint
from secateur.pruning.events import Event
from secateur.pruning.headers import read_model
from secateur.pruning.job import RunResult
from secateur.pruning.pipeline import run
from secateur.recipes import ElasticRecipe, ExportRecipe, PruneRecipe, Recipe


def recipe(method: str | dict[str, Any] = "wanda", pattern: str | float = 0.5, **changes: Any) -> PruneRecipe:
    """A recipe for a model of `conftest`: 6 sequences of 32 tokens."""
    return PruneRecipe.model_validate(
        {
            "kind": "prune",
            "model": {"source": "local", "id": "tiny"},
            "method": {"name": method} if isinstance(method, str) else method,
            "sparsity": {"target": pattern} if isinstance(pattern, float) else {"pattern": pattern},
            "calibration": {"samples": 6, "sequence_length": 32},
            "output": {"dtype": "float32"},
        }
        | changes
    )


def elastic_recipe(**changes: Any) -> ElasticRecipe:
    """An elastic recipe for a model of `conftest`: 6 sequences of 32 tokens, each twice."""
    method = {"name": "epts", "epochs": 2} | changes.pop("method", {})
    return ElasticRecipe.model_validate(
        {
            "kind": "elastic",
            "model": {"source": "local", "id": "tiny"},
            "method": method,
            "calibration": {"samples": 6, "sequence_length": 32},
            "output": {"dtype": "float32"},
        }
        | changes
    )


def export_recipe(sparsity: float, allocation: dict[str, Any] | None = None, **changes: Any) -> ExportRecipe:
    """A recipe to materialise the elastic model."""
    return ExportRecipe.model_validate(
        {
            "kind": "export",
            "model": {"source": "local", "id": "tiny-epts"},
            "sparsity": {"target": sparsity, "allocation": allocation or {"name": "uniform"}},
            "output": {"dtype": "float32"},
        }
        | changes
    )


def prune(
    wanted: Recipe, source: Path, into: Path, events: list[Event] | None = None, *, cache: Path | None = None
) -> RunResult:
    """Run `wanted` on the model folder `source`; the result is in `into` / output."""
    told = [] if events is None else events
    return run(wanted, source=source, output=into / "output", cache=cache or into / "cache", on_event=told.append)


def checkpoint(folder: Path) -> Checkpoint:
    return Checkpoint(folder, read_model(folder))
