"""What jobs cost beside what `POST /v1/estimates` said before: `make bench-estimate`.

Jobs run on the demo model, one after the other, in a service that `secateur up` starts with an empty database; the first
measures the worker's pace. Each evaluates other windows, so that none finds its dense perplexity known. Seconds are those
between a job's `started_at` and `finished_at`. Written to results/estimate.json.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.engine import machine
from scripts import demo_model
from secateur import Client
from secateur.schemas.estimates import Estimate
from secateur.schemas.events import Event
from secateur.schemas.jobs import Job

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "estimate.json"
METHODS = ("magnitude", "wanda", "sparsegpt")


def bodies() -> Iterator[tuple[str, dict[str, Any]]]:
    """The jobs, in the order they run; the first two differ in their windows alone."""
    model = {"source": "local", "id": demo_model.NAME}
    for name, windows in (("evaluate, pace unknown", 5), ("evaluate", 10)):
        yield name, {"kind": "evaluate", "model": model, "evaluation": evaluation(windows)}
    for number, method in enumerate(METHODS):
        pruning = {"kind": "prune", "method": {"name": method}, "sparsity": {"target": 0.5}}
        calibration = {"samples": 32, "sequence_length": 512}
        yield method, {"model": model, **pruning, "calibration": calibration, "evaluation": evaluation(6 + number)}


def evaluation(windows: int) -> dict[str, Any]:
    return {"perplexity": {"sequence_length": 1024, "max_windows": windows}}


@contextmanager
def service(state: Path) -> Iterator[Client]:
    """A client of a service on a free port."""
    folders = ["--state", str(state), "--models", str(demo_model.ensure().parent)]
    command = [sys.executable, "-m", "secateur.cli", "up", "--json", "--port", "0", *folders]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}) as up:
        try:
            assert up.stdout is not None
            address = json.loads(up.stdout.readline())
            with Client(address["url"], Path(address["key_file"]).read_text().strip()) as client:
                yield client
        finally:
            up.terminate()
            up.wait(60)


def compared(told: Estimate, job: Job, events: list[Event]) -> dict[str, Any]:
    """What was said and what was measured; ratios are said over measured."""
    if job.status != "succeeded" or not (
        job.metrics and job.metrics.peak_memory_bytes and job.started_at and job.finished_at
    ):
        sys.exit(f"job {job.id} {job.status}: {job.error}")
    took, peak = (job.finished_at - job.started_at).total_seconds(), job.metrics.peak_memory_bytes
    said = (told.seconds.low * told.seconds.high) ** 0.5
    return {
        "seconds": {"low": told.seconds.low, "high": told.seconds.high, "measured": took, "ratio": said / took},
        "memory_bytes": {"said": told.peak_memory_bytes, "measured": peak, "ratio": told.peak_memory_bytes / peak},
        "pace_measured": told.pace.measured,
        "operations_per_second": job.metrics.operations_per_second,
        "eta_at_half": eta_at_half(events),
    }


def eta_at_half(events: list[Event]) -> dict[str, float] | None:
    """The time that was said to be left of the longest stage when half of its blocks were done, and what was left."""
    told = [event for event in events if event.type == "progress"]
    stages = {event.data["stage"]: [other for other in told if other.data["stage"] == event.data["stage"]] for event in told}
    longest = max(stages.values(), key=lambda found: found[-1].created_at - found[0].created_at)
    half = next((event for event in longest if 2 * event.data["done"] >= event.data["total"]), None)
    if half is None or half.data["eta_seconds"] is None:
        return None
    left = (longest[-1].created_at - half.created_at).total_seconds()
    return {"said": half.data["eta_seconds"], "measured": left, "ratio": half.data["eta_seconds"] / left if left else 1.0}


def main() -> None:
    rows = {}
    with tempfile.TemporaryDirectory() as scratch, service(Path(scratch) / "state") as client:
        for name, body in bodies():
            told = client.jobs.estimate(body)
            job = client.jobs.wait(client.jobs.create(body).id)
            rows[name] = row = compared(told, job, list(client.jobs.events(job.id)))
            print(
                f"{name:24}",
                *(f"{key} {row[key]['ratio']:.2f}" for key in ("seconds", "memory_bytes") if row[key]),
                flush=True,
            )
    facts = {
        "jobs": rows,
        "protocol": {
            "model": demo_model.NAME,
            "calibration": "32 x 512 tokens of wikitext2-sample",
            "evaluation": "windows of 1024 tokens of wikitext2-sample, dense and pruned",
            "ratios": "said over measured; of seconds, the middle of the range",
        },
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    RESULTS.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
