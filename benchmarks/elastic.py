"""One elastic model beside single-rate methods, on the demo model: `make bench-elastic`.

`--only` does one of four parts; each adds to results/elastic.json:

    cost      seconds of the optimisation as a multiple of a dense forward of the same tokens, size of the artifact, seconds
              and memory of materialising; wants a machine that does nothing else
    curve     perplexity at each sparsity
    beside    that of Wanda, SparseGPT and Statistical Correction, run once for each; rows that are there are kept
    service   seconds from a request to a model of that sparsity, through a service that `secateur up` starts
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.engine import MODEL, ROOT, answer, machine
from benchmarks.estimate import service
from benchmarks.ours import dense_seconds, transformers_seconds
from benchmarks.protocol import LENGTH, SAMPLES, perplexity
from benchmarks.quality import commit
from secateur.pruning.memory import peak
from secateur.pruning.pipeline import run
from secateur.recipes import Recipe, read_recipe

RESULTS = ROOT / "benchmarks" / "results" / "elastic.json"
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
LOWER = (0.1, 0.2)  # of the elastic model alone
BESIDE = ("wanda", "sparsegpt", "statistical_correction")
TEXT, OTHER_TEXT, OTHER_SPARSITIES = "wikitext2-sample", "sotu-sample", (0.5, 0.6, 0.7)
SERVED = (0.63, 0.1, 0.25, 0.33, 0.42, 0.48, 0.55, 0.68, 0.75, 0.9)


def recipe(kind: str, **more: Any) -> Recipe:
    """A recipe on the demo model, with the calibration of all benchmarks where it needs one."""
    calibration = {} if kind == "export" else {"calibration": {"samples": SAMPLES, "sequence_length": LENGTH}}
    return read_recipe({"kind": kind, "model": {"source": "local", "id": MODEL.name}, **calibration, **more})


def made(wanted: Recipe, source: Path, into: Path) -> dict[str, Any]:
    """Run a recipe; its seconds, from beginning to end and of the blocks alone, and the peak of this process."""
    began, processor = time.monotonic(), time.process_time()
    result = run(wanted, source=source, output=into, cache=into.with_suffix(".cache"), on_event=lambda _: None)
    told = {"seconds": time.monotonic() - began, "blocks_seconds": result.metrics["seconds"]["prune"]}
    told |= {"processor_seconds": time.process_time() - processor, "peak_memory_bytes": peak()}
    return told | {key: result.metrics[key] for key in ("artifact",) if key in result.metrics}


def step(wanted: str, folder: Path) -> dict[str, Any]:
    """One step, in a process of its own: `elastic`, `export 0.5`, `wanda 0.5`."""
    name, _, amount = wanted.partition(" ")
    into = place(folder, wanted)
    shutil.rmtree(into, ignore_errors=True)
    if name == "elastic":
        told = made(recipe("elastic"), MODEL, into)
        told["dense_forward_seconds"] = [dense_seconds(MODEL) for _ in range(2)]
        told["forwards"] = told["blocks_seconds"] / mean(told["dense_forward_seconds"])
        told["transformers_forward_seconds"] = [transformers_seconds(MODEL) for _ in range(2)]
        told["transformers_forwards"] = told["blocks_seconds"] / mean(told["transformers_forward_seconds"])
        told["dense_forward_processor_seconds"] = dense_seconds(MODEL, time.process_time)
        told["processor_forwards"] = told["processor_seconds"] / told["dense_forward_processor_seconds"]
        return told
    sparsity = {"sparsity": {"target": float(amount)}}
    if name == "export":
        return made(recipe("export", **sparsity), folder / "elastic", into)
    return made(recipe("prune", method={"name": name}, **sparsity), MODEL, into)


def place(folder: Path, wanted: str) -> Path:
    """Where a step leaves its model."""
    return folder / wanted.replace(" ", "-")


def cost(folder: Path, facts: dict[str, Any]) -> None:
    """The optimisation, and one sparsity materialised."""
    facts["elastic"] = in_child("elastic", folder)
    facts["elastic"]["artifact_ratio"] = facts["elastic"]["artifact"]["bytes"] / facts["elastic"]["artifact"]["base_bytes"]
    facts["export"] = in_child("export 0.63", folder)


def curve(folder: Path, facts: dict[str, Any]) -> None:
    """Perplexity of the elastic model at each sparsity."""
    facts["curve"]["epts"] = {}
    for sparsity in (*LOWER, *SPARSITIES):
        point(folder, facts, "epts", sparsity)


def beside(folder: Path, facts: dict[str, Any]) -> None:
    """Perplexity of the dense model, and of each single-rate method at each sparsity; what is known is kept."""
    facts["dense"] = facts.get("dense") or {text: perplexity(MODEL, text) for text in (TEXT, OTHER_TEXT)}
    for sparsity in SPARSITIES:
        for method in BESIDE:
            if str(sparsity) not in facts["curve"].get(method, {}):
                point(folder, facts, method, sparsity)


def point(folder: Path, facts: dict[str, Any], method: str, sparsity: float) -> None:
    """One point of the curve of a method."""
    wanted = f"{'export' if method == 'epts' else method} {sparsity}"
    told = in_child(wanted, folder)
    del told["peak_memory_bytes"]  # a child's begins at that of this process, which measured perplexities
    texts = [TEXT, *([OTHER_TEXT] if sparsity in OTHER_SPARSITIES else [])]
    told["perplexity"] = {text: perplexity(place(folder, wanted), text) for text in texts}
    facts["curve"].setdefault(method, {})[str(sparsity)] = told
    print(method, sparsity, told["perplexity"], flush=True)
    write(facts)


def through_service(folder: Path, facts: dict[str, Any]) -> None:
    """Ten sparsities of one elastic model, asked for over HTTP of an idle worker, and the first one again.

    The model is of the demo model's size and hardly trained: what it was trained for makes no difference to the seconds.
    """
    body = {"kind": "elastic", "model": {"source": "local", "id": MODEL.name}, "method": {"name": "epts", "epochs": 1}}
    body["calibration"] = {"samples": 2, "sequence_length": 64}
    with tempfile.TemporaryDirectory(dir=folder) as state, service(Path(state)) as client:
        made = client.jobs.wait(client.jobs.create(body).id)
        seconds = {}
        for sparsity in SERVED:
            began = time.monotonic()
            job = client.jobs.wait(client.materialize(made.id, sparsity).id)
            seconds[str(sparsity)] = time.monotonic() - began
            if job.status != "succeeded":
                sys.exit(f"{job.id} {job.status}: {job.error}")
        began = time.monotonic()
        client.materialize(made.id, SERVED[0])
        facts["service"] = {"post_to_succeeded_seconds": seconds, "again_seconds": time.monotonic() - began}


def in_child(wanted: str, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = answer(
        [sys.executable, "-m", "benchmarks.elastic", "--folder", str(folder), "--step", wanted], folder
    )
    return found


def write(facts: dict[str, Any]) -> None:
    stated = {
        "model": MODEL.name,
        "calibration": f"{SAMPLES} x {LENGTH} tokens of {TEXT}'s calibration articles",
        "perplexity": "32 windows of 1024 tokens of a text's evaluation part",
        "dtype": "bfloat16",
    }
    RESULTS.write_text(json.dumps(facts | {"protocol": stated}, indent=2) + "\n")


PARTS = {"cost": cost, "curve": curve, "beside": beside, "service": through_service}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / ".secateur" / "bench-elastic", help="where models are kept")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.step:
        print(json.dumps(step(options.step, options.folder)))
        return
    facts = {"curve": {}} | (json.loads(RESULTS.read_text()) if RESULTS.exists() else {})
    for name, part in PARTS.items():
        if options.only in {None, name}:
            part(options.folder, facts)
            date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            facts.setdefault("measured", {})[name] = {"date": date, "commit": commit(), "machine": machine()}
            write(facts)


if __name__ == "__main__":
    main()
