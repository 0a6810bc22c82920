"""Threads for the pieces of a layer, each with one thread of torch's: a piece stays in the cache of one core."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait

import torch


class Team:
    """As many threads as torch has here; all others, born before or later, keep their number of torch's."""

    def __init__(self) -> None:
        self.size = torch.get_num_threads()
        self._pool = pool_of_single(self.size)

    def run(self, works: Iterable[Callable[[], object]]) -> None:
        """All of them, each by whoever is free. Raises the first error when nothing is running any more."""
        waiting = iter(list(works))  # a list's, from which threads may take at once

        def work_through() -> None:
            for work in waiting:
                work()

        mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad  # each thread has its own
        running = [self._pool.submit(mode()(work_through)) for _ in range(self.size)]
        wait(running)
        for each in running:
            each.result()


def pool_of_single(count: int) -> ThreadPoolExecutor:
    """Threads whose torch has one thread each.

    To set the number changes the thread's own, and that which threads begin with when they first ask torch
    (`ATen/ParallelOpenMP.cpp`). So one more thread sets it back for the latter, as soon as ours have theirs.
    """
    met = threading.Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # the first question: asked later, it would undo this
        met.wait()
        torch.set_num_threads(1)
        met.wait()

    def set_back() -> None:
        before = torch.get_num_threads()
        met.wait()
        met.wait()
        torch.set_num_threads(before)

    pool = ThreadPoolExecutor(count, "layerdiffuse", begin)
    for _ in range(count):
        pool.submit(int)  # starts one
    last = threading.Thread(target=set_back)
    last.start()
    last.join()
    return pool
