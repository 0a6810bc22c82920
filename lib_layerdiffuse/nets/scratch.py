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
