"""When something that has failed is tried again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

MAX_WAIT = timedelta(days=1)
_JITTER = 0.2


def next_try(failures: int, pauses: Sequence[float], *, at: datetime, not_before: datetime | None = None) -> datetime | None:
    """When to try again after the `failures`-th failure in a row; None if that was the last try.

    `pauses` are seconds. Each is lengthened by up to a fifth, by chance, so that what failed together does not come back
    together. `not_before` is what the other side asked for.
    """
    if failures > len(pauses):
        return None
    chosen = at + timedelta(seconds=pauses[failures - 1] * random.uniform(1, 1 + _JITTER))
    return max(chosen, min(not_before, at + MAX_WAIT)) if not_before else chosen


def retry_after(value: str | None, *, at: datetime) -> datetime | None:
    """The moment that a `Retry-After` header (RFC 9110, section 10.2.3) names, as seconds or a date; None if it has none."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return at + timedelta(seconds=min(int(value), MAX_WAIT.total_seconds()))
    try:
        moment = parsedate_to_datetime(value)
    except ValueError:
        return None
    return moment.replace(tzinfo=moment.tzinfo or UTC)
