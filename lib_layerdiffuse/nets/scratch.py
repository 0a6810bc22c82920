"""Memory that is written into again and again."""

from __future__ import annotations

import threading
from math import prod

import torch
from torch import Tensor


class Scratch:
    """By name, as large as was ever asked for: a page of fresh memory costs as much as writing it several times.

    Each thread has its own.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self._like = torch.empty(0, dtype=dtype, device=device)
        self._of_thread = threading.local()

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Of this shape, with whatever is in it; what was written by the same name before is lost."""
        kept: dict[str, Tensor] = self._of_thread.__dict__
        numbers = prod(shape)
        if kept.get(name, self._like).numel() < numbers:
            kept[name] = self._like.new_empty(numbers)
        return kept[name][:numbers].view(shape)


class Blocks:
    """Memory that one uses after the other, for any thread: fresh memory costs as much as a layer's sums."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: list[Tensor] = []  # of bytes
        self._lock = threading.Lock()

    def take(self, dtype: torch.dtype, *shape: int, at_most: float = 1.25) -> Tensor:
        """Of this shape, with whatever is in it, in the smallest free block that is at most so much larger."""
        size = prod(shape) * dtype.itemsize
        with self._lock:
            fitting = [each for each in self._free if size <= each.numel() <= at_most * size]
            block = min(fitting, key=Tensor.numel, default=None)
            if block is not None:
                self._free = [each for each in self._free if each is not block]
        if block is None:
            block = torch.empty(size, dtype=torch.uint8, device=self._device)
        return block[:size].view(dtype).view(shape)

    def give_back(self, *taken: Tensor) -> None:
        """What `take` gave, or views of it, that nobody uses any more."""
        blocks = [torch.empty(0, dtype=torch.uint8, device=each.device).set_(each.untyped_storage()) for each in taken]
        with self._lock:
            self._free += blocks
