"""`secateur download`: bring home what a job made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from secateur import Client
from secateur._download import DownloadProgress, OnProgress
from secateur.cli.output import AsJson, print_json, stdout


def download(
    job: Annotated[str, typer.Argument(help="Id of a job that succeeded.")],
    into: Annotated[Path | None, typer.Option(help="Folder for the files; by default named as the model.")] = None,
    file: Annotated[list[str] | None, typer.Option(help="Only this file; may be repeated.")] = None,
    as_json: AsJson = False,
) -> None:
    """Download the files of a job. A download that was broken off goes on where it was; each file's SHA-256 is checked."""
    with Client() as client:
        folder = into or Path((client.jobs.get(job).repository or job).rsplit("/", 1)[-1])
        with _bar(shown=stdout.is_terminal and not as_json) as on_progress:
            client.jobs.download(job, folder, files=file, on_progress=on_progress)
    if as_json:
        print_json({"folder": str(folder)})
    else:
        stdout.print(f"All files are in {folder}, and checked.")


@contextmanager
def _bar(*, shown: bool) -> Iterator[OnProgress]:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=stdout, transient=True, disable=not shown) as progress:
        task = progress.add_task("", total=None)

        def show(now: DownloadProgress) -> None:
            progress.update(task, description=now.file, completed=now.done, total=now.total)

        yield show
