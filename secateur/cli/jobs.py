"""`secateur jobs`, `cancel`, `retry`, `delete`."""

from __future__ import annotations

from itertools import islice
from typing import Annotated

import typer

from secateur import Client
from secateur.cli.output import AsJson, print_json, print_table, stdout, summary_of
from secateur.recipes import ExportRecipe, PruneRecipe, Recipe
from secateur.schemas.jobs import Job
from secateur.schemas.sweeps import Sweep

JobId = Annotated[str, typer.Argument(help="Id of the job.", metavar="JOB")]


def jobs(
    status: Annotated[list[str] | None, typer.Option(help="Only jobs in this state; may be repeated.")] = None,
    method: Annotated[str | None, typer.Option(help="Only jobs of this method.")] = None,
    model: Annotated[str | None, typer.Option(help="Only jobs on this model.")] = None,
    limit: Annotated[int, typer.Option(help="At most so many, the newest first.", min=1)] = 20,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    with Client() as client:
        found = list(islice(client.jobs.list(status=status or (), method=method, model=model), limit))
    if as_json:
        print_json(found)
    else:
        print_table(("job", "created", "model", "work", "state"), map(_row, found), nothing="There are no such jobs.")


def cancel(
    job_id: Annotated[str, typer.Argument(help="Id of the job, or of a sweep.", metavar="JOB")], as_json: AsJson = False
) -> None:
    """Cancel a job, or all of a sweep: at once what is queued, soon what is running."""
    with Client() as client:
        _tell(client.sweeps.cancel(job_id) if job_id.startswith("swp_") else client.jobs.cancel(job_id), as_json)


def retry(job_id: JobId, as_json: AsJson = False) -> None:
    """Submit the recipe of a failed, cancelled or expired job again."""
    with Client() as client:
        _tell(client.jobs.retry(job_id), as_json)


def delete(job_id: JobId) -> None:
    """Remove the files of a job that has ended."""
    with Client() as client:
        client.jobs.delete(job_id)
    stdout.print(f"{job_id} is deleted")


def _tell(found: Job | Sweep, as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        stdout.print(f"{found.id} is {found.status}")


def _row(job: Job) -> tuple[str, ...]:
    created = f"{job.created_at.astimezone():%Y-%m-%d %H:%M}"
    return job.id, created, job.recipe.model.id, _work_of(job.recipe), summary_of(job)


def _work_of(recipe: Recipe) -> str:
    """What is done to the model: `wanda 0.5`, `sparsegpt 2:4`, `elastic`, `export 0.63`, `evaluate`."""
    if isinstance(recipe, ExportRecipe):
        return f"{recipe.kind} {recipe.sparsity.target:g}"
    if not isinstance(recipe, PruneRecipe):
        return recipe.kind
    amount = recipe.sparsity.pattern if recipe.sparsity.group else f"{recipe.sparsity.target:g}"
    return f"{recipe.method.name} {amount}"
