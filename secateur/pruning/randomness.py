"""Random numbers of a block's own: they are the same when the blocks before it were taken over from another attempt."""

from __future__ import annotations

import hashlib

import torch


def generator_of(seed: int, block: int, purpose: str) -> torch.Generator:
    """A generator whose seed any of the three changes."""
    digest = hashlib.sha256(repr((seed, block, purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # 63 bits
