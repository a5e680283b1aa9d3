"""The child that prunes: a recipe in, files out. It has no network, no secrets and no database."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.recipes import PruneRecipe
from workers.messages import Send, serve


def prune(order: Mapping[str, Any], send: Send) -> Mapping[str, Any]:
    """Run the engine as the order says: `recipe`, and the folders `source`, `texts`, `output` and `cache`."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)
    from secateur.pruning.pipeline import run  # noqa: PLC0415 (torch is loaded here, and nowhere else in the service)

    result = run(
        PruneRecipe.model_validate(order["recipe"]),
        source=Path(order["source"]),
        texts=Path(order["texts"]),
        output=Path(order["output"]),
        cache=Path(order["cache"]),
        on_event=send,
    )
    return {
        "metrics": result.metrics,
        "report": result.report,
        "files": [{"name": file.path, "size": file.size, "sha256": file.sha256} for file in result.files],
    }


if __name__ == "__main__":
    sys.exit(serve(prune))
