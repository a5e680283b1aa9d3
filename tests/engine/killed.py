"""A run that a test kills, and that tells of each block. Arguments: MODEL INTO METHOD PROPAGATE EARLIER…"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest.mock import patch

import torch

from secateur.pruning import pipeline
from secateur.pruning.datasets import read_text
from secateur.pruning.events import Event
from tests.engine.runs import elastic_recipe, recipe


def tell(event: Event) -> None:
    os.write(1, f"{event.get('stage', event['type'])} {event.get('done', '')}\n".encode())


def main(model: str, into: str, method: str, propagate: str, *earlier: str) -> None:
    torch.set_num_threads(1)
    with patch("secateur.pruning.job.read_text", lambda *wanted: read_text(*wanted)[:40_000]):
        pipeline.run(
            elastic_recipe() if method == "epts" else recipe(method, propagate=propagate),
            source=Path(model),
            output=Path(into) / "output",
            cache=Path(into) / "cache",
            on_event=tell,
            earlier=[Path(folder) for folder in earlier],
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
