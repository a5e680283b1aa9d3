"""`secateur materialize`: from an elastic model to an ordinary one."""

from __future__ import annotations

from typing import Annotated

import typer

from secateur import Client
from secateur.cli.output import AsJson, print_json, stdout
from secateur.cli.watch import follow


def materialize(
    model: Annotated[str, typer.Argument(help="Repository of the elastic model, or the id of the job that made it.")],
    sparsity: Annotated[float, typer.Option(help="Fraction of zeros.", min=0, max=0.9)],
    *,
    allocation: Annotated[
        str | None, typer.Option(help="How blocks share it: uniform, owl or alphapruning.", show_default="uniform")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model that is made.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make an ordinary model of an elastic one, at any sparsity."""
    with Client() as client:
        shared = {"name": allocation} if allocation else None
        job = client.materialize(model, sparsity, allocation=shared, name=name)
        if watch:
            follow(client, job.id, as_json=as_json)
        elif as_json:
            print_json(job)
        else:
            stdout.print(f"{job.id} is {job.status}; it makes {job.repository}")
