"""What an attempt whose run is over leaves for the next one, should it be lost before all is stored."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from secateur.pruning.checkpoint import sha256_of

OUTPUT = "output"
_RESULT = "result.json"


def leave(folder: Path, result: Mapping[str, Any]) -> None:
    """Write the runner's result down in the attempt's folder, beside its output; whole or not at all."""
    unfinished = folder / f"{_RESULT}.part"
    with unfinished.open("w") as file:
        json.dump(result, file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(folder / _RESULT)


def find(folders: Iterable[Path]) -> tuple[Path, dict[str, Any]] | None:
    """The first of the attempts' folders with a result whose files are all there and as it says; that, and the result."""
    for folder in folders:
        with suppress(OSError, ValueError, KeyError, TypeError):
            result = json.loads((folder / _RESULT).read_text())
            if all(sha256_of(folder / OUTPUT / file["name"]) == file["sha256"] for file in result["files"]):
                return folder, result
    return None
