"""`secateur sweep` and `secateur sweeps`: many methods and sparsities on one model, and their table."""

from __future__ import annotations

from itertools import islice
from typing import Annotated, Any

import typer

from secateur import Client
from secateur.cli.options import Body, model_of, takes_settings
from secateur.cli.output import AsJson, duration, print_json, print_table, stdout
from secateur.schemas.sweeps import Sweep, SweepRow


@takes_settings
def sweep(
    body: Body,
    *,
    method: Annotated[list[str] | None, typer.Option(help="May be repeated.", show_default="wanda")] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(help="Fraction of zeros; may be repeated.", show_default="0.5, if no pattern is given"),
    ] = None,
    pattern: Annotated[list[str] | None, typer.Option(help="N:M such as 2:4; may be repeated.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow it to its end, and print the table.")] = False,
    as_json: AsJson = False,
) -> None:
    """Submit a sweep: prune MODEL by each method to each sparsity and pattern, a job each."""
    asked: dict[str, Any] = {
        **body,
        "model": model_of(body),
        "methods": [{"name": name} for name in method or ["wanda"]],
        "sparsities": sparsity or ([] if pattern else [0.5]),
        "patterns": pattern or [],
    }
    with Client() as client:
        made = client.sweeps.create(asked)
        if watch:
            made = _follow(client, made.id, quiet=as_json)
    if as_json:
        print_json(made)
    elif watch:
        _print(made)
    else:
        stdout.print(f"{made.id} has {made.progress.total} jobs; its table is: secateur sweeps {made.id}")
    if watch and made.status != "succeeded":
        raise typer.Exit(1)


def sweeps(
    sweep_id: Annotated[str | None, typer.Argument(help="A sweep, to print its table.", metavar="[SWEEP]")] = None,
    limit: Annotated[int, typer.Option(help="At most so many, the newest first.", min=1)] = 20,
    as_json: AsJson = False,
) -> None:
    """List sweeps, newest first; or print the table of one."""
    with Client() as client:
        found = [client.sweeps.get(sweep_id)] if sweep_id else list(islice(client.sweeps.list(), limit))
    if as_json:
        print_json(found[0] if sweep_id else found)
    elif sweep_id:
        _print(found[0])
    else:
        rows = ((one.id, f"{one.created_at.astimezone():%Y-%m-%d %H:%M}", one.recipe.model.id, _state(one)) for one in found)
        print_table(("sweep", "created", "model", "state"), rows, nothing="There are no sweeps yet.")


def _follow(client: Client, sweep_id: str, *, quiet: bool) -> Sweep:
    """The sweep at its end; unless `quiet`, each change is told."""
    for found in client.sweeps.watch(sweep_id):
        if not quiet:
            stdout.print(_state(found))
    return found


def _state(found: Sweep) -> str:
    return f"{found.status}, {found.progress.done}/{found.progress.total} jobs"


def _print(found: Sweep) -> None:
    headings = ("method", "sparsity", "measured", "dense", "pruned", "time", "state", "job")
    print_table(headings, map(_cells, found.table), nothing="The sweep has no jobs.")


def _cells(row: SweepRow) -> tuple[str, ...]:
    given = ",".join(
        f"{key}={value}" for key, value in row.method.items() if key != "name" and isinstance(value, str | float)
    )
    return (
        f"{row.method['name']} {given}".strip(),
        f"{row.target:g}" if row.pattern == "unstructured" else row.pattern,
        "" if row.sparsity is None else f"{row.sparsity:.4f}",
        "" if row.perplexity_dense is None else f"{row.perplexity_dense:.2f}",
        "" if row.perplexity_pruned is None else f"{row.perplexity_pruned:.2f}",
        "" if row.seconds is None else duration(row.seconds),
        row.status,
        row.job_id,
    )
