"""How fast a device multiplies matrices: what nothing that trains on it can beat."""

from __future__ import annotations

import math
import time

import torch


def matrix_rate(
    device: str, dtype: torch.dtype, threads: int | None = None, size: int = 1024, limit_s: float = 0.5
) -> float:
    """FLOP/s of a square matrix product.

    Args:
        threads: On a CPU; by default as many as torch has now.
        size: Of the matrices.
        limit_s: The best counts of those products that fit into this; at least one is made.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        a, b, out = (torch.randn(size, size, device=device).to(dtype) for _ in range(3))
        a[:1] @ b  # not counted: starts the device, and loads its kernels
        best, end = math.inf, time.perf_counter() + limit_s
        while best == math.inf or time.perf_counter() < end:
            started = time.perf_counter()
            torch.mm(a, b, out=out)
            out[0, 0].item()  # waits for the device
            best = min(best, time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return 2 * size**3 / best
