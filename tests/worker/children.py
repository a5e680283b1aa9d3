"""Children for the supervisor to watch, started as `python -m tests.worker.children`; the order says how they behave."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from secateur.problems import ProblemError
from workers.messages import Send, serve
from workers.runner import leave_when_drained


def behave(order: Mapping[str, Any], send: Send) -> Mapping[str, Any]:
    print("a library that prints to standard output")
    send({"type": "stage", "stage": "pruning"})
    match order["behaviour"]:
        case "finish":
            return {"environment": dict(os.environ)}
        case "refuse":
            raise ProblemError("disk_full", "there is no room", hint="Make some.")
        case "break":
            raise ZeroDivisionError("unforeseen")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "leave":
            leave = leave_when_drained(send)
            leave({"type": "stage", "stage": "pruning"})
            for done in range(1, 600):
                time.sleep(0.1)
                leave({"type": "progress", "done": done, "total": 600, "unit": "blocks", "eta_seconds": 1.0})
        case "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            grandchild = subprocess.Popen(["sleep", "600"])
            send({"type": "log", "level": "info", "message": f"{os.getpid()} {grandchild.pid}"})
            time.sleep(600)
    raise AssertionError(order)


if __name__ == "__main__":
    sys.exit(serve(behave))
