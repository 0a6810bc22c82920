"""Work in threads of our own, each with one thread of torch's: what a strip needs stays in the cache of one core.

Torch's own threads, which share each single operation, wait for the next one by spinning. Where both kinds take turns,
those that spin hold the cores that the others need; so while ours work, torch's do not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

_of_thread = threading.local()


def _begin() -> None:
    """In each thread of ours."""
    _of_thread.is_ours = True
    torch.get_num_threads()  # a thread's first question sets its number to torch's: asked later, it would undo this
    torch.set_num_threads(1)


class Threads:
    """As many as torch has."""

    def __init__(self) -> None:
        self.count = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self.count, "layerdiffuse", _begin)

    def run(self, works: Iterable[Callable[[], object]], after: Callable[[], object] = lambda: None) -> None:
        """All of them, and `after` by each thread when none is left; what a work runs, its thread runs itself.

        Raises the first error when nothing is running any more.
        """
        if getattr(_of_thread, "is_ours", False):
            for work in works:
                work()
            return
        # As here; each thread has its own mode, and what was made in inference cannot be written outside of it.
        mode = torch.inference_mode if torch.is_inference_mode_enabled() else torch.no_grad
        waiting = iter(list(works))  # a list's, from which threads may take at once

        def work_through() -> None:
            with mode():
                for work in waiting:
                    work()
                after()

        running = [self._pool.submit(work_through) for _ in range(self.count)]
        errors = [error for each in running if (error := each.exception())]
        if errors:
            raise errors[0]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Torch's operations run in the thread that calls them."""
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(self.count)
