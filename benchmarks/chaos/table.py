"""The table of docs/operations.md, made from benchmarks/results/chaos.json: `python -m benchmarks.chaos.table`."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # they load the engine
    from benchmarks.chaos.faults import Fault
    from benchmarks.chaos.lives import Hit

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "operations.md"
RESULTS = ROOT / "benchmarks" / "results" / "chaos.json"
_MARKED = re.compile(r"(<!-- chaos -->\n).*?(<!-- /chaos -->)", re.DOTALL)
_UNTIL = {"attempt": "to the next attempt", "answer": "to its answer", "end": "to the end of the job", "": ""}


def row(fault: Fault, hits: Sequence[Hit]) -> dict[str, Any]:
    """What the results tell of one fault."""
    seconds = sorted(hit.seconds for hit in hits if hit.seconds is not None)
    return {
        "fault": fault.name,
        "stages": list(dict.fromkeys(hit.stage for hit in hits)),
        "hits": len(hits),
        "seen": fault.seen,
        "recovered_by": fault.recovered_by,
        "until": _UNTIL[fault.until],
        "seconds_median": round(seconds[len(seconds) // 2], 1) if seconds else None,
        "seconds_max": round(seconds[-1], 1) if seconds else None,
    }


def markdown(results: dict[str, Any]) -> str:
    lines = [
        "| fault | hits, at | what the client sees | what recovers it | how long (median, most) |",
        "|---|---|---|---|---|",
    ]
    for each in results["by_fault"]:
        took = f"{each['seconds_median']} s, {each['seconds_max']} s {each['until']}" if each["seconds_median"] else "—"
        hits = f"{each['hits']}: {', '.join(each['stages'])}"
        lines.append(f"| {each['fault']} | {hits} | {each['seen']} | {each['recovered_by']} | {took} |")
    names = ("wrong_states", "duplicate_successes", "orphans", "children_left")
    counts = ", ".join(f"{results[name]} {name.replace('_', ' ')}" for name in names)
    summary = (
        f"{results['faults']} faults over {results['jobs']} jobs in {results['seconds']:.0f} s, with a lease of "
        f"{results['lease_seconds']:g} s: {counts}. After a killed worker or pool process the next attempt "
        f"began within {results['recovery_leases_p95']} leases (95th percentile)."
    )
    return "\n".join([*lines, "", summary])


def with_table(page: str, results: dict[str, Any]) -> str:
    """`page` with the table as `results` has it."""
    return _MARKED.sub(lambda match: f"{match[1]}{markdown(results)}\n{match[2]}", page)


def update(results: dict[str, Any]) -> None:
    """Write the table of the docs anew."""
    PAGE.write_text(with_table(PAGE.read_text(), results))


if __name__ == "__main__":
    update(json.loads(RESULTS.read_text()))
