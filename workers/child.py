"""Starting a child process, reading what it says, and ending it with everything it started."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from workers.messages import DRAIN_SIGNAL, FINAL, Message

_LONGEST_LINE = 64 * 1024 * 1024  # a report of a model with many thousand linears is one line

# A child sees these variables and what it is given, so no secret of the service reaches the process that reads model files.
_INHERITED = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TZ",
    "TMPDIR",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "PYTHONPATH",
    "PYTHONHASHSEED",
)
_INHERITED_PREFIXES = ("CUDA_", "NVIDIA_", "OMP_", "MKL_", "OPENBLAS_", "KMP_", "TORCH_", "PYTORCH_")


class ChildLostError(Exception):
    """The child ended without a result: killed, by hand or for want of memory, or by a fault in native code."""

    def __init__(self, returncode: int) -> None:
        cause = f"was killed by {signal.Signals(-returncode).name}" if returncode < 0 else f"ended with code {returncode}"
        super().__init__(f"the child process {cause} and left no result")
        self.returncode = returncode


class ChildDrainedError(Exception):
    """The child left at the end of its block, because it was asked to."""


class ChildProblemError(Exception):
    """The child ended with a problem that the user is told about."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        super().__init__(document["detail"])
        self._document = dict(document)

    def as_document(self) -> dict[str, Any]:
        return self._document


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The child's environment: the few harmless variables of ours, and `extra`."""
    harmless = {
        name: value for name, value in os.environ.items() if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    }
    return {**harmless, **extra, "PYTHONUNBUFFERED": "1"}


async def run_child(
    module: str,
    order: Mapping[str, Any],
    *,
    env: Mapping[str, str],
    log: Path,
    terminate_seconds: float,
    on_message: Callable[[Message], None],
    drained: asyncio.Event | None = None,
) -> Message:
    """Run `python -m module` on `order`; its result.

    The child leads a session of its own; if this coroutine is cancelled, the whole session is ended (SIGTERM, after
    `terminate_seconds` SIGKILL) before the cancellation goes on. What it prints goes to the file `log`. When `drained` is
    set, a child that knows DRAIN_SIGNAL is sent it.
    Raises ChildProblemError if it ends with a problem, ChildDrainedError if it left because it was asked to, ChildLostError
    if it ends with nothing of that.
    """
    with log.open("ab") as log_file:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log_file,
            env=dict(env), start_new_session=True, limit=_LONGEST_LINE,
        )  # fmt: skip
    asking = asyncio.create_task(_ask_to_leave(process, drained)) if drained else None
    try:
        return await _converse(process, {**order, "parent": os.getpid()}, on_message)
    finally:
        if asking:
            asking.cancel()
        await _end(process, terminate_seconds)


async def _ask_to_leave(process: asyncio.subprocess.Process, drained: asyncio.Event) -> None:
    await drained.wait()
    with suppress(ProcessLookupError):
        process.send_signal(DRAIN_SIGNAL)


async def _converse(
    process: asyncio.subprocess.Process, order: Mapping[str, Any], on_message: Callable[[Message], None]
) -> Message:
    assert process.stdin is not None  # noqa: S101 (both were asked for as pipes)
    assert process.stdout is not None  # noqa: S101
    final: Message | None = None
    with suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(json.dumps(order).encode() + b"\n")
        await process.stdin.drain()
        process.stdin.close()
    async for line in process.stdout:
        if not line.endswith(b"\n"):
            break  # killed in the middle of a word
        message = json.loads(line)
        if message["type"] in FINAL:
            final = message
        else:
            on_message(message)
    returncode = await process.wait()
    if final is None:
        raise ChildLostError(returncode)
    if final["type"] == "drained":
        raise ChildDrainedError
    if final["type"] == "problem":
        raise ChildProblemError(final["problem"])
    return final


async def _end(process: asyncio.subprocess.Process, terminate_seconds: float) -> None:
    if process.returncode is None:
        _signal_session(process, signal.SIGTERM)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), terminate_seconds)
    # Also after a natural end: what the child itself started must not live on.
    _signal_session(process, signal.SIGKILL)
    await process.wait()


def _signal_session(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
