"""What the machine could not do, told as the problems that users know."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from secateur.problems import ProblemError


@contextmanager
def explained() -> Iterator[None]:
    """Turn a full disk into ProblemError `disk_full` and exhausted memory into `out_of_memory`; all else passes."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ProblemError(
            "disk_full", "The disk of the working folder is full.", hint="Free some space on it, then retry the job."
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ProblemError(
            "out_of_memory",
            "The run needs more memory than there is.",
            hint="Use fewer calibration samples or shorter sequences, or a machine with more memory.",
        ) from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed. torch's CPU allocator has no exception of its own."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
