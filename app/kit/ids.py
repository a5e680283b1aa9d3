"""Prefixed ids that sort by the time they were made: `job_` and a UUIDv7 (RFC 9562) in base 32."""

from __future__ import annotations

import secrets
import time

_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's: sorts like the number, no i, l, o, u
_LENGTH = 26


def new_id(prefix: str) -> str:
    """`prefix`, an underscore and 26 characters: 48 bits of milliseconds, then 74 random bits."""
    milliseconds = time.time_ns() // 1_000_000
    random = secrets.randbits(74)
    number = milliseconds << 80 | 0x7 << 76 | (random >> 62) << 64 | 0b10 << 62 | random & (1 << 62) - 1
    return f"{prefix}_{_base32(number)}"


def _base32(number: int) -> str:
    digits = [_ALPHABET[number >> 5 * place & 31] for place in reversed(range(_LENGTH))]
    return "".join(digits)
