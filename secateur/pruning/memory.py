"""How much memory there is, how many tokens may run at a time in it, and how it is used."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

MOST_TOKENS: dict[str, int] = {
    "cpu": 512,
    "cuda": 2048,
}  # beyond it hardly anything gets faster; a core has a micro-batch of its own
TRAINING_TOKENS = 2048  # where large tensors are kept for the next micro-batch: a seventh less time than with 512
_SHARE = 8  # the intermediate results of a micro-batch may take one part in so many of what is free
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8  # of malloc.h
_KEPT_TENSOR_BYTES, _KEPT_BYTES, _USUAL_TOP_PAD = 1 << 20, 16 << 20, 128 << 10


def batch_tokens(hidden: int, widest: int, dtype: torch.dtype, device: torch.device) -> int:
    """Tokens of a micro-batch: the largest power of two up to the device's `MOST_TOKENS` whose intermediate results fit.

    A block holds, at its worst, about eight vectors of the `hidden` size and three of the `widest` for each token, and in
    float32 some of those.
    """
    per_token = (8 * hidden + 3 * widest) * (dtype.itemsize + 4)
    tokens = MOST_TOKENS[device.type]
    while tokens > 1 and tokens * per_token * _SHARE > available(device):
        tokens //= 2
    return tokens


def available(device: torch.device) -> int:
    """Bytes that can still be had: free on the GPU, or of the machine within this process's control group."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = re.search(r"^MemAvailable:\s+(\d+) kB$", _text(Path("/proc/meminfo")), re.MULTILINE)
    limit, used = (_text(Path("/sys/fs/cgroup") / name).strip() for name in ("memory.max", "memory.current"))
    left = int(limit) - int(used) if limit.isdigit() and used.isdigit() else total
    return max(0, min(left, 1024 * int(free[1]) if free else total))


def _text(file: Path) -> str:
    """Empty where the system has no such file, or does not let this process read it."""
    try:
        return file.read_text()
    except OSError:
        return ""


def keep_what_is_freed(*, training: bool = False) -> None:
    """Let glibc keep freed tensors of up to 1 MiB, 16 MiB of them, for the next block, which needs the same again; the
    system's zeroed pages cost a fifth of a forward. To be called before the process has threads, which are given a place
    for what is kept each, at their first allocation: where two share one, a backward pass takes half as long again.

    Larger tensors go back at once. Kept as well they leave holes between those that stay: on a model of 135 million
    parameters a fifth of the peak memory. While a block is trained that is well spent, since every step asks for the same
    tensors: then those of up to 32 MiB are kept, the most that glibc takes, and 256 MiB of them; and so are the 64 MiB
    pieces that a thread's place is made of, which without the padding are given back whenever one is empty.
    """
    if libc := _glibc():
        libc.mallopt(_M_ARENA_MAX, torch.get_num_threads())
        libc.mallopt(_M_MMAP_THRESHOLD, (32 << 20) if training else _KEPT_TENSOR_BYTES)
        libc.mallopt(_M_TOP_PAD, (64 << 20) if training else _USUAL_TOP_PAD)
        libc.mallopt(_M_TRIM_THRESHOLD, (256 << 20) if training else _KEPT_BYTES)


@contextmanager
def only_what_is_new_collected() -> Iterator[None]:
    """Garbage is sought among what comes to life within. What lives already is mostly the imported libraries' own, 370
    thousand objects, to look through which takes 0.3 s: done once here, instead of ten times in a run."""
    if gc.get_freeze_count():  # by the program around this one, or a run in another thread: theirs to end
        yield
        return
    gc.collect()  # else what an earlier run left would not be found in this one either
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def give_back() -> None:
    """Hand freed memory back to the system: after a step that needed much of another kind, such as tokenising."""
    gc.collect()
    trim()


def trim() -> None:
    """Hand back what is free between tensors that stay, without looking for more. It takes about 10 ms."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def peak() -> int:
    """The largest resident set this process has had, in bytes; mapped files count."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
