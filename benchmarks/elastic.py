"""One elastic model beside single-rate methods, on the demo model: `make bench-elastic`.

First what it costs, which wants a machine that does nothing else: seconds of the optimisation as a multiple of a dense
forward of the same tokens, size of the artifact, seconds and memory of materialising. Then what it is worth: perplexity at
each sparsity, beside Wanda, SparseGPT and Statistical Correction, which are run once for each. What is known is in
results/elastic.json after each step; `--only` does one of the two on an artifact that is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.engine import MODEL, ROOT, answer, machine
from benchmarks.ours import dense_seconds
from benchmarks.protocol import LENGTH, SAMPLES, perplexity
from secateur.pruning.memory import peak
from secateur.pruning.pipeline import run
from secateur.recipes import Recipe, read_recipe

RESULTS = ROOT / "benchmarks" / "results" / "elastic.json"
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
BESIDE = ("wanda", "sparsegpt", "statistical_correction")
OTHER_TEXT, OTHER_SPARSITIES = "sotu-sample", (0.5, 0.6, 0.7)


def recipe(kind: str, **more: Any) -> Recipe:
    """A recipe on the demo model, with the calibration of all benchmarks where it needs one."""
    calibration = {} if kind == "export" else {"calibration": {"samples": SAMPLES, "sequence_length": LENGTH}}
    return read_recipe({"kind": kind, "model": {"source": "local", "id": MODEL.name}, **calibration, **more})


def made(wanted: Recipe, source: Path, into: Path) -> dict[str, Any]:
    """Run a recipe; its seconds, from beginning to end and of the blocks alone, and the peak of this process."""
    began = time.monotonic()
    result = run(wanted, source=source, output=into, cache=into.with_suffix(".cache"), on_event=lambda _: None)
    told = {"seconds": time.monotonic() - began, "blocks_seconds": result.metrics["seconds"]["prune"]}
    return (
        told | {"peak_memory_bytes": peak()} | {key: result.metrics[key] for key in ("artifact",) if key in result.metrics}
    )


def step(wanted: str, folder: Path) -> dict[str, Any]:
    """One step, in a process of its own: `elastic`, `export 0.5`, `wanda 0.5`."""
    name, _, amount = wanted.partition(" ")
    into = folder / wanted.replace(" ", "-")
    if name == "elastic":
        told = made(recipe("elastic"), MODEL, into)
        dense = [dense_seconds(MODEL) for _ in range(2)]
        return told | {"dense_forward_seconds": dense, "forwards": told["blocks_seconds"] / (sum(dense) / 2)}
    sparsity = {"sparsity": {"target": float(amount)}}
    if name == "export":
        return made(recipe("export", **sparsity), folder / "elastic", into)
    return made(recipe("prune", method={"name": name}, **sparsity), MODEL, into)


def cost(folder: Path, facts: dict[str, Any]) -> None:
    """The optimisation, and one sparsity materialised."""
    facts["elastic"] = in_child("elastic", folder)
    facts["elastic"]["artifact_ratio"] = facts["elastic"]["artifact"]["bytes"] / facts["elastic"]["artifact"]["base_bytes"]
    facts["export"] = in_child("export 0.63", folder)


def quality(folder: Path, facts: dict[str, Any]) -> None:
    """Perplexity at each sparsity, of the elastic model and of each method beside it."""
    facts["dense"] = {text: perplexity(MODEL, text) for text in ("wikitext2-sample", OTHER_TEXT)}
    for sparsity in SPARSITIES:
        for method in ("export", *BESIDE):
            told = in_child(f"{method} {sparsity}", folder)
            texts = ["wikitext2-sample", *([OTHER_TEXT] if sparsity in OTHER_SPARSITIES else [])]
            told["perplexity"] = {text: perplexity(folder / f"{method}-{sparsity}", text) for text in texts}
            facts.setdefault("curve", {}).setdefault("epts" if method == "export" else method, {})[str(sparsity)] = told
            print(method, sparsity, told["perplexity"], flush=True)
            write(facts)


def in_child(wanted: str, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = answer(
        [sys.executable, "-m", "benchmarks.elastic", "--folder", str(folder), "--step", wanted], folder
    )
    return found


def write(facts: dict[str, Any]) -> None:
    stated = {
        "model": MODEL.name,
        "calibration": f"{SAMPLES} x {LENGTH} tokens of wikitext2-sample's calibration articles",
        "perplexity": "32 windows of 1024 tokens of a text's evaluation part",
        "dtype": "bfloat16",
        "method": recipe("elastic").model_dump(mode="json")["method"],
    }
    RESULTS.write_text(json.dumps({"protocol": stated, "machine": machine(), **facts}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / ".secateur" / "bench-elastic", help="where models are kept")
    parser.add_argument("--only", choices=("cost", "quality"))
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.step:
        print(json.dumps(step(options.step, options.folder)))
        return
    facts = json.loads(RESULTS.read_text()) if options.only and RESULTS.exists() else {}
    for name, work in (("cost", cost), ("quality", quality)):
        if options.only in {None, name}:
            work(options.folder, facts)
            write(facts)


if __name__ == "__main__":
    main()
