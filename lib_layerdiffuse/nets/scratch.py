"""Memory that is written into again and again."""

from __future__ import annotations

import threading
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

PAGE = 4096  # bytes that blocks are measured in: two threads never write to the same line of a cache


class Part(NamedTuple):
    """Of a piece of memory."""

    piece: int
    begin: int  # byte
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


class Blocks:
    """Memory that one uses after the other, for any thread: fresh memory costs as much as a layer's sums.

    It comes in pieces as large as the largest block so far; where a large block was, there is room for several small
    ones, and for a large one again when they are given back.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._largest = 0  # bytes
        self._pieces: list[Tensor] = []  # of bytes
        self._free: list[Part] = []  # none begins where another ends
        self._taken: dict[int, Part] = {}  # by address
        self._lock = threading.Lock()

    def take(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Of this shape, with whatever is in it, in the smallest free part that is large enough."""
        used = prod(shape) * dtype.itemsize
        size = -(-used // PAGE) * PAGE
        with self._lock:
            piece, begin, end = self._free_part(size)
            if begin + size < end:
                self._free.append(Part(piece, begin + size, end))
            block = self._pieces[piece][begin : begin + used].view(dtype).view(shape)
            self._taken[block.data_ptr()] = Part(piece, begin, begin + size)
        return block

    def _free_part(self, size: int) -> Part:
        part = min((each for each in self._free if each.size >= size), key=lambda each: each.size, default=None)
        if part:
            self._free.remove(part)
            return part
        self._largest = max(self._largest, size)
        self._pieces.append(torch.empty(self._largest, dtype=torch.uint8, device=self._device))
        return Part(len(self._pieces) - 1, 0, self._largest)

    def give_back(self, *blocks: Tensor) -> None:
        """What `take` gave, its axes in any order, that nobody uses any more."""
        with self._lock:
            for block in blocks:
                piece, begin, end = self._taken.pop(block.data_ptr())
                for other in [each for each in self._free if each.piece == piece]:
                    if other.end == begin or other.begin == end:
                        self._free.remove(other)
                        begin, end = min(begin, other.begin), max(end, other.end)
                self._free.append(Part(piece, begin, end))


class Scratch:
    """Blocks by name, as large as was asked for since the last `give_back`; each thread has its own."""

    def __init__(self, blocks: Blocks, dtype: torch.dtype = torch.float32) -> None:
        self._blocks = blocks
        self._dtype = dtype
        self._of_thread = threading.local()

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Of this shape, with whatever is in it; what was written by the same name before is lost.

        dtype: always the same for a name; default: the scratch's.
        """
        kept: dict[str, Tensor] = self._of_thread.__dict__
        numbers = prod(shape)
        if name in kept and kept[name].numel() < numbers:
            self._blocks.give_back(kept.pop(name))
        if name not in kept:
            kept[name] = self._blocks.take(dtype or self._dtype, numbers)
        return kept[name][:numbers].view(shape)

    def give_back(self) -> None:
        """All that this thread has."""
        kept: dict[str, Tensor] = self._of_thread.__dict__
        self._blocks.give_back(*kept.values())
        kept.clear()
