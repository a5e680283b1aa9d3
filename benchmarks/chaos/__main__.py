"""`make chaos`: jobs that are beaten at every stage, and the judgement on what came of them.

Writes benchmarks/results/chaos.json and the table of docs/operations.md. Exits with 1 if anything was wrong.
"""

from __future__ import annotations

import json
import queue
import shutil
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import zip_longest
from typing import Any

from benchmarks.chaos import table
from benchmarks.chaos.faults import FAULTS, STAGES, Fault, working_at
from benchmarks.chaos.lives import Hit, Life, leases, live, successes
from benchmarks.chaos.programs import command_of, eventually, processes_of
from benchmarks.chaos.service import LEASE_SECONDS, Service, running

LOGS = table.ROOT / ".secateur" / "chaos-logs"
LANES = 2
HARMLESS_A_JOB = 2
_ORDER = ("submit", *STAGES)


def plan() -> tuple[list[Life], list[Life]]:
    """Jobs that live side by side, and those that have the service to themselves. A job loses one attempt by plan."""
    alone = [hit for hit in _hits(FAULTS) if hit.fault.alone]
    costly = [hit for hit in _hits(FAULTS) if hit.fault.costs_attempt and not hit.fault.alone]
    harmless = [hit for hit in _hits(FAULTS) if not hit.fault.costs_attempt and not hit.fault.alone]
    step = -(-len(harmless) // HARMLESS_A_JOB)
    pairs = zip_longest(*(harmless[start : start + step] for start in range(0, len(harmless), step)))
    together = []
    for cost, pair in zip_longest(costly, pairs, fillvalue=()):
        hits = [*([cost] if cost else []), *(hit for hit in pair if hit)]
        together.append(Life(sorted(hits, key=lambda hit: _ORDER.index(hit.stage))))
    return together, [Life([hit], expected=hit.fault.expected) for hit in alone]


def _hits(faults: Iterable[Fault]) -> list[Hit]:
    return [Hit(fault, stage) for fault in faults for stage in fault.stages]


def run_all(service: Service, lives: Sequence[Life], lanes: int) -> None:
    waiting: queue.SimpleQueue[Life] = queue.SimpleQueue()
    for life in lives:
        waiting.put(life)

    def lane() -> None:
        while True:
            try:
                life = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                live(service, life)
            except Exception as error:
                life.wrong.append(f"the harness: {type(error).__name__}: {error}")
            hits = ", ".join(f"{hit.fault.name} at {hit.stage}{'' if hit.at else ' (missed)'}" for hit in life.hits)
            print(f"{life.job_id} {life.status}: {hits}{''.join(f'; WRONG: {wrong}' for wrong in life.wrong)}", flush=True)

    threads = [threading.Thread(target=lane, daemon=True) for _ in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def orphans(service: Service) -> list[str]:
    """Blobs without a row, rows without a blob, and work folders of jobs that have ended."""
    rows = {row["sha256"] for row in service.rows("SELECT DISTINCT sha256 FROM artifacts")}
    blobs = {file.name for file in service.bucket.rglob("*") if file.is_file()}
    folders = [folder.name for folder in (service.state / "work").glob("job_*")]
    return [*(f"blob {name}" for name in blobs - rows), *(f"row {name}" for name in rows - blobs), *folders]


def children_left(service: Service, lives: Sequence[Life]) -> list[str]:
    return [command_of(pid) for life in lives for pid in working_at(service, life.job_id)]


def summary(lives: Sequence[Life], seconds: float, found: dict[str, Any]) -> dict[str, Any]:
    hits = [hit for life in lives for hit in life.hits if hit.at is not None]
    killed = leases([hit.seconds for hit in hits if hit.fault.is_kill_of_worker and hit.seconds is not None])
    by_fault: dict[str, list[Hit]] = defaultdict(list)
    for hit in hits:
        by_fault[hit.fault.name].append(hit)
    return {
        "faults": len(hits),
        "jobs": len(lives),
        "wrong_states": sum(life.status != life.expected for life in lives),
        **found,
        "wrong": [f"{life.job_id}: {wrong}" for life in lives for wrong in life.wrong],
        "recovery_leases_p95": round(killed[int(len(killed) * 0.95)], 3) if killed else None,
        "recovery_leases_max": round(killed[-1], 3) if killed else None,
        "lease_seconds": LEASE_SECONDS,
        "seconds": round(seconds, 1),
        "database": "PostgreSQL",
        "broker": "Valkey",
        "store": "S3",
        "by_fault": [table.row(fault, by_fault[fault.name]) for fault in FAULTS],
    }


def main() -> int:
    # What is told to stop takes its programs down first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    together, alone = plan()
    with running() as service:
        eventually(service.api_answers, 60, "the API answers")
        undisturbed = Life([])
        live(service, undisturbed)
        run_all(service, together, LANES)
        missed = [Life([Hit(hit.fault, hit.stage)]) for life in together for hit in life.hits if hit.at is None]
        run_all(service, missed, LANES)
        run_all(service, alone, 1)
        afterwards = Life([])
        live(service, afterwards)
        lives = [undisturbed, *together, *missed, *alone, afterwards]
        with suppress(TimeoutError):
            eventually(lambda: not orphans(service), 30, "all is collected")
        for life in lives:
            if life.status == "succeeded" and life.weights != undisturbed.weights:
                life.wrong.append("its weights are not those of an undisturbed run")
        found = {
            "duplicate_successes": sum(successes(service, life.job_id) > 1 for life in lives),
            "children_left": len(children_left(service, lives)),
            "orphans": len(orphans(service)),
        }
        shutil.rmtree(LOGS, ignore_errors=True)
        shutil.copytree(service.folder / "logs", LOGS)
        folder = service.folder
    found["children_left"] += len(list(processes_of(folder)))
    results = summary(lives, time.monotonic() - began, found)
    table.RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    table.update(results)
    print(json.dumps({key: value for key, value in results.items() if key != "by_fault"}, indent=2))
    wrong = ("wrong_states", "duplicate_successes", "orphans", "children_left", "wrong")
    return int(any(results[name] for name in wrong))


if __name__ == "__main__":
    sys.exit(main())
