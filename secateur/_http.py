"""The client's conversation with the service, without any input or output of its own.

A call is a generator: it yields steps (a request to send, a pause, work on files, an item for the caller's loop) and is sent
what came of them. `_drivers.py` carries out the same calls in two ways, blocking and on an event loop, so nothing is written
twice.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeGuard, TypeVar

from pydantic import BaseModel, ValidationError

from secateur.errors import ProblemResponseError, UnexpectedAnswerError, UnreachableError, error_of
from secateur.schemas.problems import Problem

TRIES = 4
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0
_TRANSIENT = frozenset({429, 500, 502, 503, 504})

T = TypeVar("T")
Body = TypeVar("Body", bound=BaseModel)
Parameters = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Reply:
    """What the service answered; `body` is empty if it was streamed away."""

    status: int
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Request:
    """A request to send; the driver answers with a `Reply` or an `UnreachableError`.

    `repeatable` says that sending it twice does no harm, `patience` how many seconds longer than usual the answer may take.
    `into`, given the head of a good reply, returns where its body goes piece by piece.
    """

    method: str
    path: str
    parameters: Parameters = ()
    json: Any = None
    headers: Mapping[str, str] = field(default_factory=dict)
    repeatable: bool = True
    patience: float = 0
    into: Callable[[Reply], Callable[[bytes], None]] | None = None


@dataclass(frozen=True, slots=True)
class Pause:
    """Do nothing for some seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Work:
    """Call a function that may block; the driver answers with what it returns."""

    function: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class Open:
    """Send a request and leave its answer open, instead of the one that was; the driver answers as to a `Request`.

    The body of a good answer is then had by `Read`, piece by piece.
    """

    request: Request


@dataclass(frozen=True, slots=True)
class Read:
    """Wait for the next piece of the open answer; the driver answers with it, or with no bytes if it ended or broke off."""


@dataclass(frozen=True, slots=True)
class Emit(Generic[T]):
    """Hand an item to the caller's loop."""

    item: T


Call = Generator[Request | Pause | Work, Any, T]
"""A call that returns a T."""

Stream = Generator[Request | Pause | Work | Open | Read | Emit[T], Any, None]
"""A call that hands out T after T."""


def send(request: Request) -> Call[Reply]:
    """Send a request, again if it failed for the moment and is repeatable, and return the good reply.

    Raises UnreachableError, or the ProblemResponseError that was answered.
    """
    tries = 0
    while True:
        outcome: Reply | UnreachableError = yield request
        if is_good(outcome):
            return outcome
        tries += 1
        if tries == TRIES or not (request.repeatable and is_transient(outcome)):
            raise failure(outcome)
        yield Pause(pause_after(tries, outcome))


def receive(request: Request, shape: type[Body]) -> Call[Body]:
    """Send a request and return its answer as a `shape`. Raises as `send` does, and UnexpectedAnswerError."""
    reply = yield from send(request)
    try:
        return shape.model_validate_json(reply.body)
    except ValidationError as error:
        raise UnexpectedAnswerError(
            f"The answer to {request.method} {request.path} is not the {shape.__name__} that this client knows "
            f"({error.error_count()} differences). Its version may be too old for the service."
        ) from error


def failure(outcome: Reply | UnreachableError) -> UnreachableError | ProblemResponseError:
    """A bad outcome as an exception."""
    return outcome if isinstance(outcome, UnreachableError) else error_of(_problem(outcome))


def is_good(outcome: Reply | UnreachableError) -> TypeGuard[Reply]:
    """Whether the service did what it was asked."""
    return isinstance(outcome, Reply) and outcome.status < 400


def is_transient(outcome: Reply | UnreachableError) -> bool:
    """Whether the same request may succeed in a moment."""
    if isinstance(outcome, UnreachableError) or outcome.status in _TRANSIENT:
        return True
    return outcome.status == 409 and _problem(outcome).retryable


def pause_after(tries: int, outcome: Reply | UnreachableError) -> float:
    """Seconds to wait after so many tries: what the service asks for, otherwise doubling, with chance to part the crowd."""
    asked = outcome.headers.get("retry-after", "") if isinstance(outcome, Reply) else ""
    if asked.isdecimal():
        return min(float(asked), _LONGEST_PAUSE)
    return _FIRST_PAUSE * 2.0 ** (tries - 1) * random.uniform(0.75, 1.25)


def _problem(reply: Reply) -> Problem:
    try:
        return Problem.model_validate_json(reply.body)
    except ValidationError:  # a proxy in between, or no Secateur at all
        beginning = reply.body[:200].decode(errors="replace")
        return Problem(
            type="about:blank",
            title="Not an answer of Secateur",
            status=reply.status,
            detail=f"The answer had status {reply.status} and was no problem document: {beginning!r}",
            code="unknown",
            retryable=reply.status in _TRANSIENT,
        )
