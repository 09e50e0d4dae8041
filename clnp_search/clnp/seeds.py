"""Random streams by name: the same words give the same numbers, whatever was drawn before."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *words: str | int) -> torch.Generator:
    """A CPU generator for the purpose that `words` name, for example `generator(0, "order", task, epoch)`."""
    digest = hashlib.sha256("/".join(str(word) for word in (seed, *words)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
