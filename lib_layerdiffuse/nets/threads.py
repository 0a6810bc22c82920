"""Work in threads of our own, each with one thread of torch's: what a strip needs stays in the cache of one core.

Torch's own threads, which share each single operation, wait for the next one by spinning. Where both kinds take turns,
those that spin hold the cores that the others need; so what is not shared runs in a thread of ours too, which leads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

INTERVAL = 0.5  # seconds until an interrupt is heard: Windows' waits without an end hear none

Answer = TypeVar("Answer")


class Threads:
    """As many as torch has, and one that leads them. All others, born before or later, keep their number of torch's."""

    def __init__(self) -> None:
        self.count = torch.get_num_threads()
        self._pool = pool_of_single(self.count + 1)
        self._shared = False  # what is at work
        self._given_up = False

    def lead(self, work: Callable[[], Answer]) -> Answer:
        """What the work answers, which calls `run` for all that can be shared. Raises its error."""
        leader = self._pool.submit(in_mode(work))
        try:
            while not leader.done():
                wait([leader], INTERVAL)
        finally:
            self._given_up = not leader.done()
        return leader.result()

    def run(self, works: Iterable[Callable[[], object]], after: Callable[[], object] = lambda: None) -> None:
        """All of them, and `after` by each thread when none is left; what a work runs, its thread runs itself.

        Raises the first error when nothing is running any more; CancelledError where nobody waits for the leader.
        """
        if self._given_up:
            raise CancelledError
        if self._shared:
            for work in works:
                work()
            return
        waiting = iter(list(works))  # a list's, from which threads may take at once

        def work_through() -> None:
            for work in waiting:
                work()
            after()

        self._shared = True
        running = [self._pool.submit(in_mode(work_through)) for _ in range(self.count)]
        errors = [error for each in running if (error := each.exception())]
        self._shared = False
        if errors:
            raise errors[0]


def in_mode(work: Callable[[], Answer]) -> Callable[[], Answer]:
    """For another thread: each has its own mode, and what was made in inference cannot be written outside of it."""
    mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad
    return mode()(work)


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
