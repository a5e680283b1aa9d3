"""What a child process tells its supervisor: JSON objects, one a line, on what was its standard output.

`{"type": "stage" | "progress" | "log", …}` while it works (the engine's events, as they are), then one
`{"type": "result", …}`, `{"type": "problem", "problem": {…}}` (a problem document) or `{"type": "drained"}` (it was asked to
leave, and has left what it finished for the next attempt), and the end.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from secateur.problems import ProblemError
from workers.lifeline import die_with_parent

Message = Mapping[str, Any]
Send = Callable[[Message], None]
FINAL = frozenset({"result", "problem", "drained"})
DRAIN_SIGNAL = signal.SIGUSR1
"""Asks a child to leave at the end of its block."""


def serve(work: Callable[[Mapping[str, Any], Send], Mapping[str, Any]]) -> int:
    """The whole life of a child process: read the order, do the work, send the result or the problem; the exit code.

    `work` takes the order (a JSON object, from standard input) and a way to send messages, and returns the result.
    Standard output becomes the messages' alone: what libraries print goes to standard error, which is the child's log.
    """
    order = json.loads(sys.stdin.readline())
    die_with_parent(order["parent"])
    send = _take_over_stdout()
    try:
        send({"type": "result", **work(order, send)})
    except ProblemError as problem:
        traceback.print_exc()
        send({"type": "problem", "problem": problem.as_document()})
        return 1
    except Exception as error:
        traceback.print_exc()
        unforeseen = ProblemError("internal_error", f"{type(error).__name__}: {error}")
        send({"type": "problem", "problem": unforeseen.as_document()})
        return 1
    return 0


def _take_over_stdout() -> Send:
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def send(message: Message) -> None:
        line = json.dumps(message, allow_nan=False, separators=(",", ":"))
        with lock:
            channel.write(line + "\n")
            channel.flush()

    return send
