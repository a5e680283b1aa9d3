"""Perplexity of methods at sparsities, one row each: `make bench-quality METHODS="wanda sparsegpt" SPARSITIES="0.5 2:4"`.

A contender is a method's name and, behind commas, parameters that differ from its defaults, dotted where they are nested:
`wanda,comparison=layer`. What is a field of the recipe (`propagate=none`, `calibration.samples=64`) is set there. `dense` is
the model as it is.

Rows are appended to results/quality.jsonl, whose first line is the protocol. A row that is there is not measured again,
so a run that was stopped goes on where it was; with --again it is, and the newest row counts. At the end the tables of
the docs are brought up to date (benchmarks.tables).
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from benchmarks.protocol import ROOT, perplexity
from benchmarks.rows import IN_DOMAIN, MODEL, PRODUCTS, Results, Row, asked_of, recipe_of
from benchmarks.tables import update
from secateur.pruning.checkpoint import Checkpoint
from secateur.pruning.headers import read_model
from secateur.pruning.pipeline import run
from secateur.recipes import PruneRecipe


def measured(folder: Path, recipe: PruneRecipe | None, datasets: Iterable[str]) -> Row:
    """Prune the model in `folder` (None: do not) and take the perplexity on each of `datasets`."""
    with tempfile.TemporaryDirectory() as scratch:
        result, sparsity = folder, 0.0
        if recipe:
            result = Path(scratch) / "output"
            done = run(recipe, source=folder, output=result, cache=Path(scratch) / "cache", on_event=lambda _: None)
            sparsity = done.metrics["sparsity"]
        return Row(
            model=folder.name,
            model_sha256=_digest(folder),
            asked=asked_of(recipe) if recipe else None,
            perplexity={dataset: perplexity(result, dataset) for dataset in datasets},
            sparsity=sparsity,
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
            commit=commit(),
            products=PRODUCTS,
        )


@cache
def _digest(folder: Path) -> str:
    with Checkpoint(folder, read_model(folder)) as checkpoint:
        return checkpoint.sha256


@cache
def commit() -> str:
    """The commit that is checked out, with a + if the code differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True).strip()

    changed = git("status", "--porcelain", "--", "secateur", "benchmarks/*.py")
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="", help="contenders, with spaces between them")
    parser.add_argument("--sparsities", default="0.5 0.6 0.7 2:4 4:8")
    parser.add_argument("--datasets", default=IN_DOMAIN, help=f"{IN_DOMAIN} and, out of domain, sotu-sample")
    parser.add_argument("--model", type=Path, default=ROOT / ".secateur" / "models" / MODEL)
    parser.add_argument("--again", action="store_true", help="also measure rows that are there")
    options = parser.parse_args()
    if not options.model.is_dir():
        sys.exit(f"{options.model} is not there: `make demo` makes the demo model.")
    results, datasets = Results(), options.datasets.split()
    for contender in options.methods.split():
        for sparsity in options.sparsities.split() if contender != "dense" else [""]:
            recipe = recipe_of(contender, sparsity) if sparsity else None
            row = results.find(asked_of(recipe) if recipe else None, PRODUCTS, options.model.name)
            if options.again or row is None or not set(datasets) <= row.perplexity.keys():
                row = measured(options.model, recipe, datasets)
                results.append(row)
            told = ", ".join(f"{dataset} {value:.2f}" for dataset, value in row.perplexity.items())
            print(f"{contender} {sparsity}: {told} ({row.date}, {row.commit})", flush=True)
    update(results)


if __name__ == "__main__":
    main()
