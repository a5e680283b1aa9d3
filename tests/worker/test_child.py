"""A child's result, its problems, its death, and that nothing of it survives."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from workers.child import ChildDrainedError, ChildLostError, ChildProblemError, environment, run_child
from workers.messages import Message


async def run(
    behaviour: str, log: Path, heard: list[Message] | None = None, drained: asyncio.Event | None = None, **env: str
) -> Message:
    return await run_child(
        "tests.worker.children",
        {"behaviour": behaviour},
        env=environment(env),
        log=log,
        terminate_seconds=0.3,
        on_message=(heard if heard is not None else []).append,
        drained=drained,
    )


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def eventually(condition: Any, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


async def test_result_and_messages_arrive_and_what_libraries_print_goes_to_the_log(tmp_path: Path) -> None:
    heard: list[Message] = []
    result = await run("finish", tmp_path / "log", heard)
    assert result["type"] == "result"
    assert heard == [{"type": "stage", "stage": "pruning"}]
    assert "a library that prints" in (tmp_path / "log").read_text()


async def test_child_sees_no_secret_of_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "SECATEUR_DATABASE_URL", "SECATEUR_BROKER_URL", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret")
    seen = (await run("finish", tmp_path / "log", HF_HUB_OFFLINE="1"))["environment"]
    assert "secret" not in seen.values()
    assert seen["HF_HUB_OFFLINE"] == "1"


async def test_problem_of_the_child_is_the_problem_of_the_job(tmp_path: Path) -> None:
    with pytest.raises(ChildProblemError) as caught:
        await run("refuse", tmp_path / "log")
    document = caught.value.as_document()
    assert (document["code"], document["detail"], document["hint"]) == ("disk_full", "there is no room", "Make some.")


async def test_unforeseen_exception_is_named_and_its_traceback_is_in_the_log(tmp_path: Path) -> None:
    with pytest.raises(ChildProblemError) as caught:
        await run("break", tmp_path / "log")
    assert caught.value.as_document()["code"] == "internal_error"
    assert "ZeroDivisionError: unforeseen" in (tmp_path / "log").read_text()


async def test_child_that_is_drained_leaves_at_the_end_of_its_block(tmp_path: Path) -> None:
    heard: list[Message] = []
    drained = asyncio.Event()
    running = asyncio.create_task(run("leave", tmp_path / "log", heard, drained))
    await eventually(lambda: len(heard) > 4)
    drained.set()
    before = heard[-1]["done"]
    with pytest.raises(ChildDrainedError):
        await asyncio.wait_for(running, 5)
    assert heard[-1]["type"] == "progress"
    assert heard[-1]["done"] >= before + 1


async def test_killed_child_is_lost_and_the_signal_is_named(tmp_path: Path) -> None:
    with pytest.raises(ChildLostError, match="SIGKILL"):
        await run("die", tmp_path / "log")


async def test_cancellation_ends_a_child_that_ignores_sigterm_and_what_it_started(tmp_path: Path) -> None:
    heard: list[Message] = []
    task = asyncio.create_task(run("hang", tmp_path / "log", heard))
    await eventually(lambda: len(heard) == 2)
    child, grandchild = map(int, heard[1]["message"].split())
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
    assert not alive(child)
    await eventually(lambda: not alive(grandchild))


async def test_child_dies_with_its_killed_parent(tmp_path: Path) -> None:
    program = (
        "import asyncio, pathlib, sys\n"
        "from tests.worker.test_child import run\n"
        "class Tell(list):\n"
        "    def append(self, message): print(message.get('message', ''), flush=True)\n"
        "asyncio.run(run('hang', pathlib.Path(sys.argv[1]), Tell()))\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path / "log"], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        child, grandchild = map(int, parent.stdout.readline().split())
        os.kill(parent.pid, signal.SIGKILL)
    await eventually(lambda: not alive(child))
    os.kill(grandchild, signal.SIGKILL)
