"""Seconds of contenders (see benchmarks.quality) as multiples of Wanda's: `make bench-seconds METHODS="sparsegpt ria"`.

All are run in turn, Wanda first, at 50 % on the demo model, as often as --rounds says; a multiple is the median of the
rounds' multiples. Seconds are those from the first block's load to the last block's shard. To be run on a machine that does
nothing else. Appended to results/seconds.jsonl, from which the docs' tables take their last column.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmarks.protocol import ROOT
from benchmarks.quality import commit
from benchmarks.rows import MODEL, PRODUCTS, SECONDS, Results, Timing, asked_of, recipe_of
from benchmarks.tables import update
from secateur.pruning.pipeline import run

SPARSITY = "0.5"


def seconds_of(contender: str, folder: Path, sparsity: str = SPARSITY) -> float:
    """Seconds of one run."""
    with tempfile.TemporaryDirectory() as scratch:
        output, cache = Path(scratch) / "output", Path(scratch) / "cache"
        result = run(recipe_of(contender, sparsity), source=folder, output=output, cache=cache, on_event=lambda _: None)
        return float(result.metrics["seconds"]["prune"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", required=True, help="contenders, with spaces between them")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folder, contenders = ROOT / ".secateur" / "models" / MODEL, options.methods.split()
    seconds_of("wanda", folder)  # the first run of a process also warms it up
    rounds = [{each: seconds_of(each, folder) for each in ["wanda", *contenders]} for _ in range(options.rounds)]
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    for contender in contenders:
        timing = Timing(
            asked=asked_of(recipe_of(contender, SPARSITY)),
            seconds=median(each[contender] for each in rounds),
            multiple=median(each[contender] / each["wanda"] for each in rounds),
            rounds=options.rounds,
            date=today,
            commit=commit(),
            products=PRODUCTS,
        )
        print(f"{contender}: {timing.seconds:.2f} s, {timing.multiple:.2f} x Wanda's", flush=True)
        with SECONDS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(timing)) + "\n")
    update(Results())


if __name__ == "__main__":
    main()
