"""The command line: `secateur`. Most commands speak to a service by the client; `up` loads the server when it is run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from secateur import __version__
from secateur.cli import catalog, download, hub_token, jobs, materialize, submit, sweeps, watch
from secateur.cli.output import tell_error
from secateur.cli.up import up
from secateur.errors import SecateurError

app = typer.Typer(
    name="secateur",
    help="Prune large language models: submit a job, watch it, download what it made.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (
    up,
    submit.submit,
    submit.evaluate,
    submit.estimate,
    sweeps.sweep,
    sweeps.sweeps,
    watch.watch,
    download.download,
    jobs.jobs,
    jobs.cancel,
    jobs.retry,
    jobs.delete,
    catalog.methods,
    catalog.models,
    materialize.materialize,
    hub_token.hub_token,
):
    app.command()(command)


def _tell_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def connect(
    url: Annotated[str | None, typer.Option(help="Address of the service.", envvar="SECATEUR_URL")] = None,
    state: Annotated[
        Path | None,
        typer.Option(help="State folder of a service on this machine, for its address and key.", envvar="SECATEUR_STATE"),
    ] = None,
    _version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_tell_version, is_eager=True)
    ] = False,
) -> None:
    """Prune large language models: submit a job, watch it, download what it made.

    The API key is SECATEUR_API_KEY, or that of the service on this machine.
    """
    # Where the client looks for what it is not told (`secateur.connection`).
    os.environ.update({"SECATEUR_URL": url} if url else {}, **({"SECATEUR_STATE": str(state)} if state else {}))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Exits with 1 for a problem or a failed job, with 2 for wrong usage."""
    try:
        app(arguments)
    except SecateurError as error:
        tell_error(error)
        sys.exit(1)
    except OSError as error:
        print(f"secateur: {error}", file=sys.stderr)
        sys.exit(1)
