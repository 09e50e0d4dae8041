"""Work that a GPU does again and again, recorded once and launched as one (CUDA graphs).

A training step of narrow networks is a hundred kernels of a few microseconds each, which Python launches one by one
more slowly than a GPU computes them. A record is launched at once.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Replay:
    """Calls work: on a GPU as it is for the first time, recorded the second time, and replayed from then on.

    Work takes no arguments. What it reads and writes are tensors that stay where they are, and what it gives are the
    same tensors each time, overwritten by its next call. On a CPU it is called each time.
    """

    def __init__(self, device: torch.device) -> None:
        self._records_any = device.type == "cuda"
        self._called: set[Hashable] = set()
        self._records: dict[Hashable, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._staged: dict[Hashable, Tensor] = {}
        # Records are replayed one after another, so that they can share what memory they need.
        self._pool = torch.cuda.graph_pool_handle() if self._records_any else None

    def __call__(self, key: Hashable, work: Callable[[], T]) -> T:
        """What `work` gives.

        Args:
            key: Of this work; other shapes are another work.
        """
        if not self._records_any:
            return work()
        if key not in self._called:  # kernels are chosen and loaded, which cannot be recorded
            self._called.add(key)
            return work()
        if key not in self._records:
            graph = torch.cuda.CUDAGraph()
            gc.collect()  # no other record may end while one is made
            # A record that fails, for want of memory, say, would leave its own stream behind.
            with torch.cuda.stream(torch.cuda.current_stream()), warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The CUDA Graph is empty")  # of a full network, say
                with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
                    result = work()
            self._records[key] = graph, result
        graph, result = self._records[key]
        graph.replay()
        return result

    def stage(self, key: Hashable, tensor: Tensor) -> Tensor:
        """A tensor's values where recorded work finds them: always the same place for a key and a shape."""
        if not self._records_any:
            return tensor
        staged = self._staged.get((key, tensor.shape))
        if staged is None:
            self._staged[key, tensor.shape] = staged = torch.empty_like(tensor)
        return staged.copy_(tensor)
