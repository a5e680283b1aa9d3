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
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _out_of_memory() from error
    except RuntimeError as error:
        # torch's CPU allocator has no exception of its own
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise _out_of_memory() from error


def _out_of_memory() -> ProblemError:
    return ProblemError(
        "out_of_memory",
        "The run needs more memory than there is.",
        hint="Use fewer calibration samples or shorter sequences, or a machine with more memory.",
    )
