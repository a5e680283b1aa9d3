"""Tables of the docs that are made from results/quality.jsonl: `python -m benchmarks.tables`.

A page says between two marks what it wants, and the table appears below: sparsities behind `quality`, then a line for each
contender with the name that it is shown by.

    <!-- quality 0.5 2:4
    Wanda = wanda
    -->
    …
    <!-- /quality -->

Each figure is the perplexity and, in brackets, its multiple of the first contender's. Behind them are the seconds at the
first sparsity as a multiple of Wanda's (benchmarks.seconds), if any contender has them.
"""

from __future__ import annotations

import re

from benchmarks.protocol import ROOT
from benchmarks.rows import IN_DOMAIN, Results, Row, Timing, asked_of, recipe_of

DOCS = ROOT / "docs"
_MARKED = re.compile(
    r"<!-- quality (?P<sparsities>[^\n]*)\n(?P<contenders>.*?)\n-->\n(?P<table>.*?)<!-- /quality -->", re.DOTALL
)


def update(results: Results) -> None:
    """Write every table of the docs anew."""
    for page in sorted(DOCS.rglob("*.md")):
        before = page.read_text(encoding="utf-8")
        after = with_tables(before, results)
        if after != before:
            page.write_text(after, encoding="utf-8")


def with_tables(page: str, results: Results) -> str:
    """`page` with its tables as `results` has them."""

    def filled(match: re.Match[str]) -> str:
        wanted = [line.split(" = ", 1) for line in match["contenders"].splitlines()]
        head = match[0][: match.start("table") - match.start()]
        return f"{head}{table(match['sparsities'].split(), wanted, results)}\n<!-- /quality -->"

    return _MARKED.sub(filled, page)


def table(sparsities: list[str], contenders: list[list[str]], results: Results) -> str:
    """A Markdown table and, under it, when and by which code its rows were measured. What was not measured is a dash."""
    rows = {
        (name, sparsity): results.find(asked_of(recipe_of(contender, sparsity)))
        for name, contender in contenders
        for sparsity in sparsities
    }
    timings = {name: results.timing(asked_of(recipe_of(contender, sparsities[0]))) for name, contender in contenders}
    first, timed = contenders[0][0], any(timings.values())
    heads = ["", *(_percent(sparsity) for sparsity in sparsities), *(["seconds"] if timed else [])]
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for name, _ in contenders:
        cells = [_cell(rows[name, sparsity], rows[first, sparsity]) for sparsity in sparsities]
        lines.append(_line([name, *cells, *([_multiple(timings[name])] if timed else [])]))
    return "\n".join([*lines, "", _origin([row for row in rows.values() if row], results)])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _multiple(timing: Timing | None) -> str:
    return f"{timing.multiple:.2f}" if timing else "—"


def _percent(sparsity: str) -> str:
    return sparsity if ":" in sparsity else f"{100 * float(sparsity):g} %"


def _cell(row: Row | None, first: Row | None) -> str:
    if row is None:
        return "—"
    value = row.perplexity[IN_DOMAIN]
    multiple = f" ({value / first.perplexity[IN_DOMAIN]:.3f})" if first and first is not row else ""
    return f"{value:.4g}{multiple}"


def _origin(rows: list[Row], results: Results) -> str:
    dense = results.find(None)
    told = f"Dense: {dense.perplexity[IN_DOMAIN]:.2f}. " if dense else ""
    dates = " to ".join(sorted({min(row.date for row in rows), max(row.date for row in rows)})) if rows else "never"
    commits = ", ".join(f"`{each}`" for each in sorted({row.commit for row in rows}))
    return f"{told}Measured {dates} by `make bench-quality` at {commits or 'no commit'}."


if __name__ == "__main__":
    update(Results())
