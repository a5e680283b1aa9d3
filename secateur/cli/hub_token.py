"""`secateur hub-token`: the token that the service asks the hub with."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from secateur import Client
from secateur.cli.output import stdout


def hub_token(forget: Annotated[bool, typer.Option("--forget", help="Have the service forget it.")] = False) -> None:
    """Give the service your Hugging Face token, for gated and private models. It is asked for, or read from the input."""
    with Client() as client:
        if forget:
            client.forget_hub_token()
            stdout.print("The service has no hub token now.")
            return
        # Never an argument: those are seen by everybody on the machine, and kept in the shell's history.
        token = typer.prompt("Hub token", hide_input=True) if sys.stdin.isatty() else sys.stdin.readline()
        client.set_hub_token(token.strip())
        stdout.print("The service has the token, and keeps it encrypted.")
