"""Writes `openapi.json`, the published contract: `python -m app.openapi`. A test fails when it drifts from the code."""

from __future__ import annotations

import json
from pathlib import Path

from app.main import create_app

FILE = Path(__file__).resolve().parents[1] / "openapi.json"


def document() -> str:
    """The OpenAPI document of the service, as it stands in the file."""
    return json.dumps(create_app().openapi(), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


if __name__ == "__main__":
    FILE.write_text(document())
