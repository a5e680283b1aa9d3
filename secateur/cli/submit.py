"""`secateur submit` and `secateur estimate`: from flags, or from a file, to a job or to what one would cost."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from secateur import Client
from secateur.cli.options import Body, given_only, model_of, takes_recipe
from secateur.cli.output import AsJson, duration, print_json, size, stdout
from secateur.cli.watch import follow
from secateur.schemas.estimates import Estimate

Watch = Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")]


@takes_recipe
def submit(body: Body, watch: Watch = False, as_json: AsJson = False) -> None:
    """Submit a job: prune MODEL."""
    with Client() as client:
        _submit(client, body, watch=watch, as_json=as_json)


def evaluate(
    model: Annotated[str, typer.Argument(help="A folder below the models root, or the id of a job that made a model.")],
    *,
    source: Annotated[
        str | None, typer.Option(help="Where it is: local, hub, mlflow or artifact.", show_default="local")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")] = None,
    evaluation: Annotated[str | None, typer.Option(help="Data set.")] = None,
    window_length: Annotated[int | None, typer.Option(help="Tokens in a window.")] = None,
    max_windows: Annotated[int | None, typer.Option(help="Stop after so many.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 or float32.")] = None,
    watch: Watch = False,
    as_json: AsJson = False,
) -> None:
    """Submit a job that measures the perplexity of MODEL as it is."""
    perplexity = {"dataset": evaluation, "sequence_length": window_length, "max_windows": max_windows}
    chosen = given_only({
        "model": {"id": model, "source": source, "revision": revision},
        "evaluation": {"perplexity": perplexity},
        "dtype": dtype,
    })  # fmt: skip
    with Client() as client:
        _submit(client, chosen | {"kind": "evaluate", "model": model_of(chosen)}, watch=watch, as_json=as_json)


@takes_recipe
def estimate(body: Body, as_json: AsJson = False) -> None:
    """Tell what a job would cost: memory, disk, seconds. Nothing is queued."""
    with Client() as client:
        found = client.jobs.estimate(body)
    if as_json:
        print_json(found)
        return
    for line in _told(found):
        stdout.print(line)


def _submit(client: Client, body: dict[str, Any], *, watch: bool, as_json: bool) -> None:
    job = client.jobs.create(body)
    if watch:
        follow(client, job.id, as_json=as_json)
    elif as_json:
        print_json(job)
    else:
        stdout.print(f"{job.id} is {job.status}; follow it with: secateur watch {job.id}")


def _told(found: Estimate) -> list[str]:
    pace = f"{found.pace.operations_per_second / 1e9:.3g} G operations a second"
    known = "as measured by the latest jobs" if found.pace.measured else "a default: no job has measured it yet"
    tokens = f"{found.tokens.calibration} tokens to calibrate, about {found.tokens.evaluation} to evaluate"
    return [
        f"model     {found.parameters / 1e6:.4g} M parameters, {found.pruned_parameters / 1e6:.4g} M of them in linears",
        f"work      {found.operations / 1e12:.3g} T operations: {tokens}",
        f"time      {duration(found.seconds.low)} to {duration(found.seconds.high)} ({pace}, {known})",
        f"memory    {size(found.peak_memory_bytes)}, {size(found.device_memory_bytes)} of it on a GPU",
        f"disk      {size(found.disk_bytes)}",
        f"queue     {found.queue}",
        *(f"warning   {warning}" for warning in found.warnings),
    ]
