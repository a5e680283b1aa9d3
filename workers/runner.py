"""The child that runs the engine: a recipe in, files and numbers out. It has no secrets and is confined before it reads."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.recipes import read_recipe
from workers.messages import DRAIN_SIGNAL, Message, Send, serve
from workers.sandbox import confine


def leave_when_drained(send: Send) -> Send:
    """`send`, but once DRAIN_SIGNAL has come the end of a block is the end of this process.

    What is finished lies on disk by then. The process ends there and does not unwind, for a run that fails tidies up.
    """
    drained = threading.Event()
    signal.signal(DRAIN_SIGNAL, lambda *_: drained.set())
    stage = ""

    def send_or_leave(message: Message) -> None:
        nonlocal stage
        send(message)
        if message["type"] == "stage":
            stage = message["stage"]
        elif message["type"] == "progress" and stage == "pruning" and message["unit"] == "blocks" and drained.is_set():
            send({"type": "drained"})
            os._exit(0)

    return send_or_leave


def work(order: Mapping[str, Any], send: Send) -> Mapping[str, Any]:
    """Run the engine as the order says: `recipe`, and the folders `source`, `texts`, `output`, `cache`, `earlier`; `work`
    holds what this attempt writes and what earlier ones left.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    shortfall = confine(readable=[Path(order["source"])], writable=[Path(order["work"]), Path(order["cache"])])
    if shortfall:
        send({"type": "log", "level": "warning", "message": shortfall})
    from secateur.pruning.pipeline import run  # noqa: PLC0415 (torch is loaded here, and nowhere else in the service)

    result = run(
        read_recipe(order["recipe"]),
        source=Path(order["source"]),
        texts=Path(order["texts"]),
        output=Path(order["output"]),
        cache=Path(order["cache"]),
        earlier=[Path(folder) for folder in order["earlier"]],
        on_event=leave_when_drained(send),
    )
    return {
        "metrics": result.metrics,
        "report": result.report,
        "files": [{"name": file.path, "size": file.size, "sha256": file.sha256} for file in result.files],
    }


if __name__ == "__main__":
    sys.exit(serve(work))
