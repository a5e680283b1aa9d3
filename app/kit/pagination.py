"""Cursors: where a page of a list, newest first, has ended. Opaque to the client, and signed."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, TypeVar

from app.kit.keyring import Keyring
from secateur.problems import ProblemError, at


@dataclass(frozen=True, slots=True)
class Position:
    """The last row of a page; the next one begins behind it."""

    created_at: datetime
    id: str


class _Row(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def created_at(self) -> datetime: ...


Row = TypeVar("Row", bound=_Row)


def cut(rows: Sequence[Row], limit: int, keyring: Keyring) -> tuple[Sequence[Row], str | None]:
    """The page out of up to `limit + 1` rows, and the cursor of the next page if there is one."""
    if len(rows) <= limit:
        return rows, None
    last = rows[limit - 1]
    return rows[:limit], write_cursor(Position(last.created_at, last.id), keyring)


def write_cursor(position: Position, keyring: Keyring) -> str:
    payload = f"{position.created_at.isoformat()} {position.id}".encode()
    return base64.urlsafe_b64encode(keyring.sign(payload) + payload).decode().rstrip("=")


def read_cursor(cursor: str, keyring: Keyring) -> Position:
    """Raises `validation_error` at /query/cursor if the cursor is not one of ours."""
    try:
        packed = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        signature, payload = packed[:16], packed[16:]
        if hmac.compare_digest(signature, keyring.sign(payload)):
            created_at, _, id_ = payload.decode().partition(" ")
            return Position(datetime.fromisoformat(created_at), id_)
    except (binascii.Error, ValueError):
        pass
    raise _wrong_cursor()


def _wrong_cursor() -> ProblemError:
    return at("/query/cursor", "validation_error", "the cursor is not one that this service gave; start again without it")
