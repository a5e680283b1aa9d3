"""Signatures after the Standard Webhooks specification, by its own library."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime

from standardwebhooks.webhooks import Webhook

_SECRET_BYTES = 32


def new_secret() -> str:
    """`whsec_` and 256 random bits in base 64."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def headers_of(message_id: str, body: str, keys: Sequence[str], *, at: datetime) -> Mapping[str, str]:
    """The headers that a receiver verifies `body` by; while a secret is being rotated there are two signatures."""
    return {
        "webhook-id": message_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": " ".join(Webhook(key).sign(message_id, at, body) for key in keys),
    }
