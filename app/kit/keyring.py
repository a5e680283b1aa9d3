"""The keys of one installation, in one file that only its owner can read."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from secateur.problems import ProblemError


@dataclass(frozen=True, slots=True)
class Keyring:
    """`api_keys` digests API keys, `cursors` signs cursors, `secrets` encrypts tenants' secrets, newest key first."""

    api_keys: bytes
    cursors: bytes
    secrets: MultiFernet

    def digest_of(self, api_key: str) -> str:
        """The HMAC-SHA256 that an API key is stored and found by, in hexadecimal."""
        return hmac.new(self.api_keys, api_key.encode(), hashlib.sha256).hexdigest()

    def sign(self, payload: bytes) -> bytes:
        """The first 16 bytes of the HMAC-SHA256 of a cursor."""
        return hmac.new(self.cursors, payload, hashlib.sha256).digest()[:16]

    def encrypt(self, secret: str) -> bytes:
        return self.secrets.encrypt(secret.encode())

    def decrypt(self, ciphertext: bytes) -> str:
        """Raises `service_unavailable` if it was encrypted with a key that the keyring does not have."""
        try:
            return self.secrets.decrypt(ciphertext).decode()
        except InvalidToken:
            raise ProblemError(
                "service_unavailable",
                "a stored secret was encrypted with a key that is not in the keyring",
                hint="Put the old keyring file back, or set the secret again.",
            ) from None


def load_keyring(file: Path) -> Keyring:
    """The keyring in `file`, which is made if it is not there; several processes may do so at once.

    Raises `service_unavailable` if the file cannot be read or is not a keyring.
    """
    try:
        if not file.exists():
            _make(file)
        document = json.loads(file.read_text())
        return Keyring(
            api_keys=base64.b64decode(document["api_keys"], validate=True),
            cursors=base64.b64decode(document["cursors"], validate=True),
            secrets=MultiFernet([Fernet(key) for key in document["secrets"]]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProblemError(
            "service_unavailable",
            f"the keyring {file} cannot be used: {type(error).__name__}",
            hint="Put the right file there. Without it, API keys and stored secrets are lost; remove it to begin anew.",
        ) from error


def _make(file: Path) -> None:
    document = {
        "api_keys": base64.b64encode(secrets.token_bytes(32)).decode(),
        "cursors": base64.b64encode(secrets.token_bytes(32)).decode(),
        "secrets": [Fernet.generate_key().decode()],
    }
    create_private(file, json.dumps(document, indent=2) + "\n")


def create_private(file: Path, content: str) -> bool:
    """Write a file that only its owner can read, as a whole or not at all; False if somebody was faster, who then wins."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(draft, file)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    return True
