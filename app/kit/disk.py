"""How much room the state folder's disk has, and the part of it that nothing new may take."""

from __future__ import annotations

import shutil
from pathlib import Path

from secateur.problems import ProblemError


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk that `folder` lies on, or will."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


def require_reserve(folder: Path, reserve: int) -> None:
    """Raises `disk_almost_full` if less than `reserve` bytes are free: what runs has to come to its end."""
    free = free_bytes(folder)
    if free < reserve:
        told = f"{free / 1e9:.1f} GB of disk are free, and {reserve / 1e9:.1f} GB are kept for the jobs that run"
        raise ProblemError("disk_almost_full", told, hint="Delete jobs that are not needed, or ask the operator for room.")
