"""Secateur: pruning of large language models as a service.

`from secateur import Client` needs neither torch nor the server's packages, and loads the HTTP client only then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secateur.client import AsyncClient, Client

__version__ = "0.1.0"
__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> type[AsyncClient | Client]:
    if name not in {"AsyncClient", "Client"}:
        raise AttributeError(f"module 'secateur' has no attribute {name!r}")
    from secateur import client  # noqa: PLC0415 (the engine and the service need no HTTP client)

    found: type[AsyncClient | Client] = getattr(client, name)
    return found
