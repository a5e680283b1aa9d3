"""What the children of an attempt see of our environment."""

from __future__ import annotations

import os
from pathlib import Path

from workers.child import environment

_REACHED = (
    "SECATEUR_STATE",
    "SECATEUR_MODELS_",
    "SECATEUR_HUB_",
    "SECATEUR_MLFLOW_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "SSL_CERT_",
)


def of_fetcher(cache: Path) -> dict[str, str]:
    """It has the network; `cache` is the tenant's folder for what it downloads."""
    network = {name: value for name, value in os.environ.items() if name.upper().startswith(_REACHED)}
    return environment({**network, "HF_HOME": str(cache / "huggingface")})


def of_runner(folder: Path) -> dict[str, str]:
    """It has no network; caches of libraries go into the attempt's `folder`, where it may write."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "huggingface")}
    return environment({**offline, "HOME": str(folder), "TMPDIR": str(folder / "tmp")})
