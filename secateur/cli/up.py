"""`secateur up`: the whole service on this machine."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from workers.embedded import Address


def up(
    state: Annotated[Path, typer.Option(help="Folder of the service's state; made if it is not there.")] = Path(".secateur"),
    models: Annotated[
        Path | None, typer.Option(help="Folder of the local models; by default `models` in the state.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON line when ready.")] = False,
) -> None:
    """Start everything (broker, API, worker, scheduler) and keep it running until Ctrl-C."""
    console = Console(stderr=True)
    try:
        from workers import embedded  # noqa: PLC0415 (the server's packages are loaded only by those who serve)
    except ModuleNotFoundError as missing:
        console.print(f"The server is not installed here ({missing}). Run this from the repository, or use the image.")
        raise typer.Exit(1) from None

    def announce(address: Address) -> None:
        if as_json:
            print(json.dumps({"url": address.url, "key_file": str(address.key_file)}), flush=True)
        else:
            console.print(f"[bold]Secateur is up[/bold] at {address.url}\n  docs  {address.url}/docs")
            console.print(f"  key   {address.key_file}\n  logs  {state / 'logs'}\nCtrl-C takes everything down.")

    try:
        asyncio.run(embedded.serve(state.resolve(), models.resolve() if models else None, host, port, announce))
    except (embedded.AlreadyUpError, OSError) as refusal:
        console.print(f"Secateur cannot start: {refusal}", markup=False)
        raise typer.Exit(1) from None
