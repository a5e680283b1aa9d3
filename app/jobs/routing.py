"""Which queue a job waits in: one for each size of GPU, and one for machines without.

A queue is named for the memory of its workers' GPUs: `gpu.24g` is served by cards of 24 GiB and of course by larger ones,
`cpu` by machines whose memory nobody promised anything about.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from secateur.problems import ProblemError

CPU = "cpu"
PATTERN = r"^(cpu|gpu\.[1-9][0-9]{0,3}g)$"
_GIB = 1 << 30
# What the driver, the CUDA context and the allocator's gaps leave of a card.
_USABLE = 0.9


def queue_for(needed_bytes: int, queues: Collection[str]) -> str:
    """The smallest of the installation's `queues` whose GPUs hold `needed_bytes`, otherwise `cpu`.

    Raises `too_large_for_workers` if no GPU is large enough and there is no `cpu` queue.
    """
    fitting = [queue for queue in _by_memory(queues) if needed_bytes <= usable_bytes(queue)]
    if fitting:
        return fitting[0]
    if CPU in queues:
        return CPU
    told = f"the job needs {needed_bytes / _GIB:.1f} GiB of memory; the queues are {', '.join(sorted(queues))}"
    raise ProblemError("too_large_for_workers", told, hint="Use fewer or shorter calibration samples, or a smaller model.")


def larger(queue: str, queues: Collection[str]) -> str | None:
    """The next size of GPU above that of `queue`; None if there is none."""
    above = [other for other in _by_memory(queues) if queue != CPU and usable_bytes(other) > usable_bytes(queue)]
    return above[0] if above else None


def usable_bytes(queue: str) -> int:
    """What a job may use on the workers of a GPU queue."""
    match = re.fullmatch(r"gpu\.([0-9]+)g", queue)
    if match is None:
        raise ValueError(f"{queue} is not the queue of a size of GPU")
    return int(int(match[1]) * _GIB * _USABLE)


def _by_memory(queues: Collection[str]) -> list[str]:
    return sorted((queue for queue in queues if queue != CPU), key=usable_bytes)
