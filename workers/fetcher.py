"""The child that fetches: it has the network and the tenant's tokens, and opens no model file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from app.accounts.secrets import SecretName
from app.models.fetch import fetch_model
from app.settings import Settings
from secateur.pruning.datasets import fetch_texts
from secateur.recipes import read_recipe
from workers.messages import Send, serve


def fetch(order: Mapping[str, Any], _send: Send) -> Mapping[str, Any]:
    """Bring the model of the order's `recipe`, unless it is here (`source`), and the texts into the folder `texts`.

    Returns where the model is.
    """
    settings = Settings()
    recipe = read_recipe(order["recipe"])
    source = order["source"] or fetch_model(
        recipe.model, tenant_id=order["tenant_id"], tokens=order["tokens"], settings=settings
    )
    fetch_texts(
        recipe, into=Path(order["texts"]), token=order["tokens"].get(SecretName.HUB_TOKEN), endpoint=settings.hub.endpoint
    )
    return {"source": str(source)}


if __name__ == "__main__":
    sys.exit(serve(fetch))
