"""Which bytes of a file a request wants (RFC 9110, sections 13 and 14). Pure: headers in, a span out."""

from __future__ import annotations

import re
from collections.abc import Mapping

Span = tuple[int, int]
"""`start <= i < end`."""

_ONE_RANGE = re.compile(r"bytes=\s*(\d{0,19})-(\d{0,19})\s*", re.ASCII)


class UnsatisfiableError(Exception):
    """The range begins behind the file's end, or is empty."""


def wanted_span(headers: Mapping[str, str], *, size: int, sha256: str) -> Span | None:
    """The span that `Range` asks for; None for the whole file.

    It is the whole file too if `If-Range` names another version, if `Range` is malformed or in another unit, and if it asks
    for several ranges. Raises UnsatisfiableError.
    """
    match = _ONE_RANGE.fullmatch(headers.get("range", ""))
    if match is None or match[1] == match[2] == "":
        return None
    if headers.get("if-range", f'"{sha256}"') != f'"{sha256}"':
        return None
    first, last = match[1], match[2]
    if first and last and int(last) < int(first):
        return None
    span = (int(first), min(int(last) + 1, size) if last else size) if first else (max(size - int(last), 0), size)
    if span[0] >= span[1]:
        raise UnsatisfiableError(f"{match[0]} asks for none of them")
    return span


def is_unchanged(if_none_match: str | None, sha256: str) -> bool:
    """Whether the client says that it has this version; weak tags count as well (RFC 9110, section 13.1.2)."""
    if if_none_match is None:
        return False
    tags = (tag.strip().removeprefix("W/") for tag in if_none_match.split(","))
    return any(tag in {"*", f'"{sha256}"'} for tag in tags)
