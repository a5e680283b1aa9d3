"""Tables of the docs that are made from results/quality.jsonl: `python -m benchmarks.tables`.

A page says between two marks what it wants, and the table appears below: sparsities behind `quality`, whose rows it takes
(`products` of a Row), then a line for each contender with the name that it is shown by.

    <!-- quality 0.5 2:4 in bfloat16
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
from benchmarks.rows import IN_DOMAIN, Results, Row, asked_of, recipe_of

DOCS = ROOT / "docs"
_ITSELF, _UNKNOWN = "1", "—"
_MARKED = re.compile(
    r"<!-- quality (?P<sparsities>[^\n]*) in (?P<products>\w+)\n(?P<contenders>.*?)\n-->\n(?P<table>.*?)<!-- /quality -->",
    re.DOTALL,
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
        return f"{head}{table(match['sparsities'].split(), wanted, results, match['products'])}\n<!-- /quality -->"

    filled_page, count = _MARKED.subn(filled, page)
    if count != page.count("<!-- quality "):
        raise ValueError("a mark of a table is not as the module says")
    return filled_page


def table(sparsities: list[str], contenders: list[list[str]], results: Results, products: str) -> str:
    """A Markdown table and, under it, when and by which code its rows were measured. What was not measured is a dash."""
    rows = {
        (name, sparsity): results.find(asked_of(recipe_of(contender, sparsity)), products)
        for name, contender in contenders
        for sparsity in sparsities
    }
    multiples = {name: _multiple(contender, sparsities[0], results, products) for name, contender in contenders}
    first, timed = contenders[0][0], any(multiple not in {_ITSELF, _UNKNOWN} for multiple in multiples.values())
    heads = ["", *(_percent(sparsity) for sparsity in sparsities), *(["seconds"] if timed else [])]
    lines = [_line(heads), "|---" * len(heads) + "|"]
    for name, _ in contenders:
        cells = [_cell(rows[name, sparsity], rows[first, sparsity]) for sparsity in sparsities]
        lines.append(_line([name, *cells, *([multiples[name]] if timed else [])]))
    return "\n".join([*lines, "", _origin([row for row in rows.values() if row], results.find(None, products))])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _multiple(contender: str, sparsity: str, results: Results, products: str) -> str:
    """Seconds as a multiple of Wanda's, which are the measure."""
    asked = asked_of(recipe_of(contender, sparsity))
    if asked == asked_of(recipe_of("wanda", sparsity)):
        return _ITSELF
    timing = results.timing(asked, products)
    return f"{timing.multiple:.2f}" if timing else _UNKNOWN


def _percent(sparsity: str) -> str:
    return sparsity if ":" in sparsity else f"{100 * float(sparsity):g} %"


def _cell(row: Row | None, first: Row | None) -> str:
    if row is None:
        return _UNKNOWN
    value = row.perplexity[IN_DOMAIN]
    multiple = f" ({value / first.perplexity[IN_DOMAIN]:.3f})" if first and first is not row else ""
    return f"{value:.4g}{multiple}"


def _origin(rows: list[Row], dense: Row | None) -> str:
    told = f"Dense: {dense.perplexity[IN_DOMAIN]:.2f}. " if dense else ""
    dates = " to ".join(sorted({min(row.date for row in rows), max(row.date for row in rows)})) if rows else "never"
    commits = ", ".join(f"`{each}`" for each in sorted({row.commit for row in rows}))
    return f"{told}Measured {dates} by `make bench-quality` at {commits or 'no commit'}."


if __name__ == "__main__":
    update(Results())
