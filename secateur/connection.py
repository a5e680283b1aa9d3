"""Where the service is, and the key to it: from arguments, the environment, or the state folder of `secateur up`."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from secateur.errors import NotConfiguredError

_SERVICE, _LOCK = "service.json", "lock"


@dataclass(frozen=True, slots=True)
class Connection:
    """A service's address, without a slash at its end, and an API key."""

    url: str
    key: str = field(repr=False)


def find(url: str | None = None, key: str | None = None) -> Connection:
    """The connection of `url` and `key`; what is missing is SECATEUR_URL and SECATEUR_API_KEY, then those of `secateur up`.

    `secateur up` leaves both in its state folder (SECATEUR_STATE, by default `.secateur`). Its key is used for its own
    address only. Raises NotConfiguredError.
    """
    url, key = url or os.environ.get("SECATEUR_URL"), key or os.environ.get("SECATEUR_API_KEY")
    if not (url and key):
        state = Path(os.environ.get("SECATEUR_STATE", ".secateur"))
        embedded = _embedded(state)
        url = url or (embedded.url if embedded else None)
        if not url:
            raise NotConfiguredError(_nowhere(state))
        key = key or (embedded.key if embedded and embedded.url == url.rstrip("/") else None)
    url = url.rstrip("/")
    if not key:
        raise NotConfiguredError(f"No API key for {url} is known: give one, or set SECATEUR_API_KEY.")
    if not url.startswith(("http://", "https://")):
        raise NotConfiguredError(f"The address {url!r} does not begin with http:// or https://.")
    return Connection(url, key)


def _nowhere(state: Path) -> str:
    if (state / _SERVICE).exists():
        return f"The service of '{state}' is not running: start it with `secateur up`, or give another's address."
    return f"No service is known: give its address, set SECATEUR_URL, or start one with `secateur up` (state '{state}')."


def _embedded(state: Path) -> Connection | None:
    """What `secateur up` wrote down, if it runs: one that was killed leaves its note behind."""
    file = state / _SERVICE
    try:
        if not _is_held(state / _LOCK):
            return None
        document = json.loads(file.read_text())
        return Connection(document["url"].rstrip("/"), Path(document["key_file"]).read_text().strip())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotConfiguredError(f"{file} or the key that it names cannot be read: {error}") from error


def _is_held(lock: Path) -> bool:
    """Whether a process has the lock; raises FileNotFoundError if none ever had."""
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
