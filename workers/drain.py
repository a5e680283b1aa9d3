"""One bit of shared memory by which a Celery worker tells its pool process to hand its job back and leave.

Made when this module is first imported, before the pool forks, so both sides see the same byte. No lock: a process that
is killed while it holds one would hang the other.
"""

from __future__ import annotations

import mmap

_flag = mmap.mmap(-1, 1)


def begin() -> None:
    """Ask for the drain; called in the parent."""
    _flag[0] = 1


def under_way() -> bool:
    """Whether the drain was asked for."""
    return _flag[0] == 1
