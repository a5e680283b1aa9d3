"""Rows of the benchmarks of quality and seconds: what was asked, what it gave, and the files that keep them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from benchmarks.engine import machine
from benchmarks.protocol import EVALUATION, LENGTH, ROOT, SAMPLES
from secateur.pruning.device import best_device
from secateur.pruning.products import multiplies_bfloat16
from secateur.recipes import PruneRecipe

MODEL = "smollm2-135m"
RESULTS = ROOT / "benchmarks" / "results" / "quality.jsonl"
SECONDS = ROOT / "benchmarks" / "results" / "seconds.jsonl"
IN_DOMAIN = "wikitext2-sample"

PROTOCOL: dict[str, Any] = {
    "calibration": f"{SAMPLES} x {LENGTH} tokens of {IN_DOMAIN}'s calibration articles, seed 0, unless a row says otherwise",
    "perplexity": f"{EVALUATION.max_windows} windows of {EVALUATION.sequence_length} tokens of a dataset's evaluation text",
    "dtype": "bfloat16",
}


@dataclass(frozen=True, slots=True)
class Row:
    """What one recipe made of one model. `asked`: see `asked_of`, None for the dense model; `perplexity` by dataset;
    `products`: how bfloat16 was multiplied: by `cuda`, by the processor's `amx` or its other instructions for `bfloat16`, or
    in `float32` (secateur.pruning.products), by what it says that it can do. Sums in another order choose other masks here
    and there, so only rows of the same are compared."""

    model: str
    model_sha256: str
    asked: dict[str, Any] | None
    perplexity: dict[str, float]
    sparsity: float
    date: str
    commit: str
    products: str


@dataclass(frozen=True, slots=True)
class Timing:
    """The median seconds of a recipe over some rounds, and the median of their multiples of Wanda's in the same round."""

    asked: dict[str, Any]
    seconds: float
    multiple: float
    rounds: int
    date: str
    commit: str
    products: str


def _products() -> str:
    device = best_device().type
    if device != "cpu":
        return device
    if machine()["amx_bf16"]:
        return "amx"
    return "bfloat16" if multiplies_bfloat16() else "float32"


PRODUCTS = _products()  # on this machine

_ROW, _TIMING = TypeAdapter(Row), TypeAdapter(Timing)


def recipe_of(contender: str, sparsity: str) -> PruneRecipe:
    """The recipe of a contender at a sparsity (`0.5`, `2:4`). Raises ValueError for one that is not valid."""
    name, *settings = contender.split(",")
    body: dict[str, Any] = {
        "kind": "prune",
        "model": {"source": "local", "id": "model"},
        "method": {"name": name},
        "sparsity": {"pattern": sparsity} if ":" in sparsity else {"target": float(sparsity)},
        "calibration": {"samples": SAMPLES, "sequence_length": LENGTH},
    }
    for setting in settings:
        key, _, value = setting.partition("=")
        *parents, last = key.split(".")
        place = body if (parents or [last])[0] in PruneRecipe.model_fields else body["method"]
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = _value(value)
    return PruneRecipe.model_validate(body)


def _value(text: str) -> Any:
    """`0.5`, `true`, `null`, `[1]` as JSON; whatever is none is a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def asked_of(recipe: PruneRecipe) -> dict[str, Any]:
    """The part of a recipe that decides the weights, defaults filled in: by this a row is known."""
    return recipe.model_dump(mode="json", include={"method", "sparsity", "calibration", "propagate"})


def _today(asked: dict[str, Any]) -> dict[str, Any]:
    """What was asked, with the defaults of fields that recipes did not have when it was."""
    body = {"kind": "prune", "model": {"source": "local", "id": "model"}, **asked}
    try:
        return asked_of(PruneRecipe.model_validate(body))
    except ValidationError:  # a field that is no more: nobody will ask for it
        return asked


class Results:
    """The results file. Raises ValueError if its protocol is another."""

    def __init__(self, path: Path = RESULTS) -> None:
        self._path = path
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"protocol": PROTOCOL}) + "\n", encoding="utf-8")
        header, *lines = path.read_text(encoding="utf-8").splitlines()
        if json.loads(header) != {"protocol": PROTOCOL}:
            raise ValueError(f"{path} was measured by another protocol; move it away")
        rows = [_ROW.validate_json(line) for line in lines]
        self.rows = [replace(row, asked=_today(row.asked)) if row.asked else row for row in rows]
        timed = SECONDS.read_text(encoding="utf-8").splitlines() if SECONDS.exists() else []
        self._timings = [_TIMING.validate_json(line) for line in timed]

    def find(self, asked: dict[str, Any] | None, products: str, model: str = MODEL) -> Row | None:
        """The newest row of a model for what was asked."""
        wanted = (model, asked, products)
        return next((row for row in reversed(self.rows) if (row.model, row.asked, row.products) == wanted), None)

    def timing(self, asked: dict[str, Any], products: str) -> Timing | None:
        """The newest timing of what was asked."""
        wanted = (asked, products)
        return next((each for each in reversed(self._timings) if (_today(each.asked), each.products) == wanted), None)

    def append(self, row: Row) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        self.rows.append(row)
