"""How the commands speak: tables and sentences for people, JSON for programs, errors on the error output."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from secateur.errors import ProblemResponseError, SecateurError
from secateur.schemas.jobs import Job, Status
from secateur.schemas.problems import FaultBody, Problem

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

# What the service says may hold square brackets and must not be taken for rich's markup.
stdout = Console(markup=False, highlight=False, soft_wrap=True)
stderr = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)


def print_json(document: BaseModel | Sequence[BaseModel] | dict[str, Any]) -> None:
    """One line of JSON."""
    if isinstance(document, BaseModel):
        print(document.model_dump_json(), flush=True)
    elif isinstance(document, dict):
        print(json.dumps(document), flush=True)
    else:
        print(json.dumps([one.model_dump(mode="json") for one in document]), flush=True)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, nothing: str) -> None:
    """A table, or the sentence `nothing` if it would be empty. A pipe gets whole cells, however wide."""
    table = Table(*headings, box=None, header_style="bold", pad_edge=False)
    for row in rows:
        table.add_row(*row)
    if not table.row_count:
        stdout.print(nothing)
    elif stdout.is_terminal:
        stdout.print(table)
    else:
        Console(file=stdout.file, markup=False, highlight=False, width=1000).print(table)


def tell_error(error: SecateurError) -> None:
    """What went wrong, where, and what to do about it."""
    if isinstance(error, ProblemResponseError):
        tell_problem(error.problem)
        if error.request_id:
            stderr.print(f"  request {error.request_id}", style="dim")
    else:
        stderr.print(f"secateur: {error}")
        _tell_hint(error.hint)


def tell_problem(problem: Problem) -> None:
    """A problem of a request or of a job."""
    stderr.print(f"secateur: {_sentence(problem.detail)} ({problem.code})")
    for fault in problem.errors:
        stderr.print(f"  at {_place(fault)}" + (f": {fault.detail}" if fault.detail != problem.detail else ""))
    _tell_hint(problem.hint)


def _tell_hint(hint: str | None) -> None:
    if hint:
        stderr.print(f"  {_sentence(hint)}")


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _place(fault: FaultBody) -> str:
    return fault.pointer or "the body"


def summary_of(job: Job) -> str:
    """A job in one line: what it is, how far, and what was measured."""
    parts = [f"{job.status}", *_standing(job)]
    if job.status == Status.RUNNING and job.stage:
        parts = [job.stage]
        if job.progress:
            parts.append(f"{job.progress.done}/{job.progress.total} {job.progress.unit}")
            if job.progress.eta_seconds:
                parts.append(f"about {duration(job.progress.eta_seconds)} left")
    if job.metrics:
        parts.extend(_measured(job))
    return ", ".join(parts)


def _standing(job: Job) -> Iterable[str]:
    waiting = job.waiting
    if waiting is None:
        return
    yield f"{waiting.position} in line of {job.queue}"
    if waiting.workers == 0:
        yield "no worker serves it at the moment"
    elif waiting.eta_seconds is not None:
        yield f"begins in about {duration(waiting.eta_seconds)}"


def _measured(job: Job) -> Iterable[str]:
    metrics = job.metrics
    if metrics is None:
        return
    if metrics.sparsity is not None:
        yield f"sparsity {metrics.sparsity:.4g}"
    if metrics.perplexity:
        known = (metrics.perplexity.value, metrics.perplexity.dense, metrics.perplexity.pruned)
        yield "perplexity " + " -> ".join(f"{value:.2f}" for value in known if value is not None)
    if metrics.seconds and metrics.seconds.total is not None:
        yield duration(metrics.seconds.total)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: float) -> str:
    """A number of bytes, such as `269.1 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"
