"""The child that takes a finished model somewhere: it has the network and one secret, and opens no tensor."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from app.integrations.protocol import Product
from app.integrations.registry import INTEGRATIONS
from app.settings import Settings
from secateur.recipes import read_model_recipe
from workers.messages import Send, serve


def integrate(order: Mapping[str, Any], _send: Send) -> Mapping[str, Any]:
    """Run the integration that the order names on its `product`; the `url` where the model is found."""
    integration = INTEGRATIONS[order["name"]]
    given = order["product"]
    product = Product(
        job_id=given["job_id"],
        repository=given["repository"],
        recipe=read_model_recipe(given["recipe"]),
        metrics=given["metrics"],
        report=given["report"],
        started_at=datetime.fromisoformat(given["started_at"]),
        finished_at=datetime.fromisoformat(given["finished_at"]),
        folder=Path(given["folder"]),
    )
    options = integration.options.model_validate(order["options"])
    return {"url": integration.deliver(product, options, Settings(), order["secret"])}


if __name__ == "__main__":
    sys.exit(serve(integrate))
