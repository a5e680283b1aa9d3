"""Threads that share the micro-batches among the processor's cores.

An operation on a micro-batch takes so little time that torch's own threads spend a quarter of a forward waiting for one
another. Here each core takes micro-batches of its own, and an operation runs on one core.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_THIS = threading.local()
WORTH_LANES = 16  # so many items, of some 250 thousand elements each
MOST_LANES = 8  # each holds the intermediate results of a micro-batch; with more cores a lane has several


class Lanes:
    """Item i of any `map` runs in the same thread, whatever is mapped over it: greenlets cannot change theirs."""

    def __init__(self, count: int, threads: int) -> None:
        self.count, before = count, torch.get_num_threads()
        self._pools = [
            ThreadPoolExecutor(1, f"lane-{number}", partial(_use_threads, threads // count))
            for number in range(count if count > 1 else 0)
        ]
        for pool in self._pools:
            pool.submit(threading.get_ident).result()
        if self._pools:
            torch.set_num_threads(before)  # a lane's call changed what threads to come begin with

    def map(self, task: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`task` of every item, in order. If one fails its lane stops, the others are waited for, and the first failing
        lane's failure is raised.

        From within a lane the items are done one after the other: the other lanes have their own.
        """
        if len(items) == 1 or not self._pools or _in_lane():
            return [task(item) for item in items]
        graded = torch.is_grad_enabled()  # which is a setting of each thread

        def run(share: Sequence[Item]) -> list[Result]:
            with torch.set_grad_enabled(graded):
                return [task(item) for item in share]

        # One call for a lane's whole share: to hand over a small task takes as long as to do it.
        futures = [pool.submit(run, items[lane :: self.count]) for lane, pool in enumerate(self._pools)]
        wait(futures)
        shares = [future.result() for future in futures]
        return [shares[i % self.count][i // self.count] for i in range(len(items))]


def _use_threads(count: int) -> None:
    """Let operations of this thread have `count` threads, whatever is said elsewhere later on."""
    _THIS.in_lane = True
    torch.set_num_threads(count)
    torch.get_num_threads()  # a thread's first question settles its own number


def _in_lane() -> bool:
    return getattr(_THIS, "in_lane", False)


def lanes(device: torch.device) -> Lanes:
    """The lanes of a device: a GPU's one, or as many as the threads that torch may use, up to `MOST_LANES`."""
    threads = torch.get_num_threads()
    return _lanes(1 if device.type != "cpu" or _in_lane() else min(threads, MOST_LANES), threads)


_lanes = cache(Lanes)


def map_short(task: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> list[Result]:
    """`task` of every item, in order, for operations so short that threads take longer to meet, a tenth of a millisecond
    where they sleep meanwhile. So each has one thread: a lane's if there is enough for lanes to do, else the caller's."""
    if device.type != "cpu" or _in_lane():
        return [task(item) for item in items]
    before = torch.get_num_threads()
    if len(items) >= WORTH_LANES:
        count = min(before, MOST_LANES)
        return _lanes(count, count).map(task, items)
    torch.set_num_threads(1)
    try:
        return [task(item) for item in items]
    finally:
        torch.set_num_threads(before)
