"""`secateur watch`: a job's way to its end, as a bar on a terminal, as lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from secateur import Client
from secateur.cli.output import AsJson, print_json, stdout, summary_of, tell_problem
from secateur.schemas.events import Event
from secateur.schemas.jobs import Job, Progress, Status

Show = Callable[[Job, Event | None], None]


def watch(job: Annotated[str, typer.Argument(help="Id of the job.")], as_json: AsJson = False) -> None:
    """Follow a job to its end. Exits with 1 if it does not succeed."""
    with Client() as client:
        follow(client, job, as_json=as_json)


def follow(client: Client, job_id: str, *, as_json: bool) -> None:
    """Show what has happened to the job, and what does; raises typer.Exit with code 1 if it ends without success."""
    job = client.jobs.get(job_id).model_copy(update={"metrics": None, "error": None})
    with _json_lines() if as_json else _bar() if stdout.is_terminal else _lines() as show:
        for event in client.jobs.stream_events(job_id):
            job = _after(job, event)
            show(job, event)
        job = client.jobs.get(job_id)
        show(job, None)
    if not as_json:
        _tell_end(job)
    if job.status != Status.SUCCEEDED:
        raise typer.Exit(1)


def _after(job: Job, event: Event) -> Job:
    """The job as the event left it."""
    match event.type:
        case "status":
            told = {
                "status": Status(event.data["status"]),
                "attempt": event.data["attempt"],
                "stage": None,
                "progress": None,
            }
        case "stage":
            told = {"stage": event.data["stage"], "progress": None}
        case "progress":
            told = {"progress": Progress.model_validate(event.data)}
        case "log":
            told = {}
    return job.model_copy(update=told)


def _tell_end(job: Job) -> None:
    if job.error:
        tell_problem(job.error)
    else:
        stdout.print(f"{job.id} {summary_of(job)}")
    if job.status == Status.SUCCEEDED and job.repository:
        stdout.print(f"{job.repository} is ready: secateur download {job.id}")


@contextmanager
def _json_lines() -> Iterator[Show]:
    def show(job: Job, event: Event | None) -> None:
        if event is None or event.type != "log":
            print_json(job)

    yield show


@contextmanager
def _lines() -> Iterator[Show]:
    last = ""

    def show(job: Job, event: Event | None) -> None:
        nonlocal last
        at = f"{(event.created_at if event else datetime.now(UTC)).astimezone():%H:%M:%S}"
        if event and event.type == "log":
            stdout.print(f"{at} {event.level}: {event.message}")
        elif (line := summary_of(job)) != last:
            stdout.print(f"{at} {line}")
            last = line

    yield show


@contextmanager
def _bar() -> Iterator[Show]:
    columns = (SpinnerColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Bar(*columns, console=stdout, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(job: Job, event: Event | None) -> None:
            if event and event.level != "info":
                bar.console.print(f"{event.level}: {event.message}")
            now = job.progress
            bar.update(task, description=summary_of(job), total=now.total if now else None, completed=now.done if now else 0)

        yield show
