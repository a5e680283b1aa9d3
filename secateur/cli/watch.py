"""`secateur watch`: a job's way to its end, as a bar on a terminal, as lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from secateur import Client
from secateur.cli.output import AsJson, print_json, stdout, summary_of, tell_problem
from secateur.schemas.jobs import Job, Status

Show = Callable[[Job], None]


def watch(job: Annotated[str, typer.Argument(help="Id of the job.")], as_json: AsJson = False) -> None:
    """Follow a job to its end. Exits with 1 if it does not succeed."""
    with Client() as client:
        follow(client, job, as_json=as_json)


def follow(client: Client, job_id: str, *, as_json: bool) -> None:
    """Show each change of the job; raises typer.Exit with code 1 if it ends without success."""
    with _json_lines() if as_json else _bar() if stdout.is_terminal else _lines() as show:
        for job in client.jobs.watch(job_id):
            show(job)
    if not as_json:
        _tell_end(job)
    if job.status != Status.SUCCEEDED:
        raise typer.Exit(1)


def _tell_end(job: Job) -> None:
    if job.error:
        tell_problem(job.error)
    else:
        stdout.print(f"{job.id} {summary_of(job)}")
    if job.status == Status.SUCCEEDED:
        stdout.print(f"{job.repository} is ready: secateur download {job.id}")


@contextmanager
def _json_lines() -> Iterator[Show]:
    yield print_json


@contextmanager
def _lines() -> Iterator[Show]:
    last = ""

    def show(job: Job) -> None:
        nonlocal last
        if (line := summary_of(job)) != last:
            stdout.print(f"{datetime.now().astimezone():%H:%M:%S} {line}")
            last = line

    yield show


@contextmanager
def _bar() -> Iterator[Show]:
    columns = (SpinnerColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=stdout, transient=True) as progress:
        task = progress.add_task("", total=None)

        def show(job: Job) -> None:
            now = job.progress
            progress.update(
                task, description=summary_of(job), total=now.total if now else None, completed=now.done if now else 0
            )

        yield show
