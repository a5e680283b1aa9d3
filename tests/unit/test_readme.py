"""The README's command lines are ones that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_group

from secateur.cli import app

README = Path(__file__).parents[2] / "README.md"
FENCED = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(secateur [^`]+)`")
COMMAND = re.compile(r"(\.venv/bin/)?secateur\s")


def command_lines() -> list[str]:
    """Those in blocks without a language, and those in the running text."""
    text = README.read_text()
    blocks = [line for block in FENCED.findall(text) for line in block.splitlines()]
    return [line for line in blocks if COMMAND.match(line)] + sorted(set(INLINE.findall(FENCED.sub("", text))))


@pytest.mark.parametrize("line", command_lines())
def test_a_command_line_parses(line: str) -> None:
    """Parsed and not run: the name of the command, its options and their values."""
    group = get_group(app)
    with group.make_context("secateur", shlex.split(line, comments=True)[1:]) as context:
        name, command, arguments = group.resolve_command(context, [*context._protected_args, *context.args])
        assert name is not None
        assert command is not None
        with command.make_context(name, arguments, parent=context):
            pass


def test_the_ways_in_are_told() -> None:
    named = {shlex.split(line, comments=True)[1] for line in command_lines()}
    assert named >= {"up", "submit", "jobs", "download"}
