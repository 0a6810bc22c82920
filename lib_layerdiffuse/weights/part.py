"""The unfinished file of a download. Of all programs that share the folder, one at a time may write it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Lock
from typing import BinaryIO
from uuid import uuid4

from filelock import BaseFileLock, FileLock

from lib_layerdiffuse.weights.files import is_file

ETAG = re.compile(r'"[!#-~]*"')  # a strong one: bytes may differ where a weak one (W/"…") is the same


class LeftError(Exception):
    """The part was left: who is still at work on it ends."""


class Part:
    """`<file>.part` beside where the file will be, with `<file>.part.etag` and `<file>.lock`.

    Who has taken it may write. Any thread may leave it in place of the one that writes, which may hang in a dead
    connection: from then on its calls raise LeftError, and nobody has to wait for it. Calls raise OSError where the
    folder does not allow it, ValueError where it is no path.
    """

    def __init__(self, folder: Path, file: str) -> None:
        self.target = folder / file
        self.path = part_of(folder, file)
        self.etag = ""  # of the body that the bytes are from, where that is known
        self.left = Event()
        self._lock_file = folder / f"{file}.lock"
        self._lock: BaseFileLock | None = None
        self._locks = False  # whether it is known that files can be locked there
        self._alone = False  # with a part that no other program knows
        self._file: BinaryIO | None = None
        self._mutex = Lock()  # of the one who writes and the one who leaves

    @property
    def _etag_file(self) -> Path:
        return self.path.with_name(f"{self.path.name}.etag")

    def take(self) -> bool:
        """Whether it is ours from now on, and nobody else has it."""
        with self._ours():
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._lock_file.touch()  # says why where it cannot be made; a lock may just count as taken
            self._lock = self._lock or lock_of(self._lock_file)
            if locked(self._lock):
                if self._etag_file.exists():
                    self.etag = strong(self._etag_file.read_text(encoding="ascii", errors="replace"))
                return True
            self._locks = self._locks or has_locks(self._lock_file)
            if not self._locks:
                self._alone = True
                self.path = part_of(self.target.parent, f"{self.target.name}.{uuid4().hex}")
            return self._alone

    def begin(self, etag: str) -> None:
        """Throw away what is there. What is written next is from a body with this ETag."""
        with self._ours():
            self._opened().truncate(0)
            self.etag = etag
            if etag:
                self._etag_file.write_text(etag, encoding="ascii")
            else:
                self._etag_file.unlink(missing_ok=True)

    def write(self, piece: bytes) -> None:
        with self._ours():
            rest = memoryview(piece)
            while rest:
                rest = rest[self._opened().write(rest) :]

    def place(self) -> Path:
        """Make it the file, unless somebody put one there meanwhile. Where that is."""
        with self._ours():
            self._close()
            if os.path.lexists(self.target):
                self._remove()
            else:
                self.path.replace(self.target)
                self._etag_file.unlink(missing_ok=True)
            return self.target

    def drop(self) -> None:
        """Throw it away."""
        with self._ours():
            self._close()
            self._remove()

    def leave(self) -> None:
        """Nothing is written from now on, and somebody else may take it. From any thread, also more than once."""
        with self._mutex:
            self.left.set()
            with suppress(OSError):  # what was written and is kept is checked before it is used
                self._close()
            if self._lock:
                self._lock.release()
            with suppress(OSError):  # Windows: somebody else has it open
                self._clear()

    def _clear(self) -> None:
        """Remove what nobody needs. Not the lock file before the file is there, or two could lock two of that name."""
        if self._alone:
            self._remove()
        if self._alone or is_file(self.target):
            self._lock_file.unlink(missing_ok=True)

    @contextmanager
    def _ours(self) -> Iterator[None]:
        with self._mutex:
            if self.left.is_set():
                raise LeftError
            yield

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self._file = self.path.open("ab", buffering=0)
        return self._file

    def _close(self) -> None:
        file, self._file = self._file, None
        if file:
            file.close()

    def _remove(self) -> None:
        for path in (self.path, self._etag_file):
            path.unlink(missing_ok=True)


def part_of(folder: Path, file: str) -> Path:
    """Where a download into the folder is kept until it is whole."""
    return folder / f"{file}.part"


def strong(etag: str) -> str:
    """The ETag, if it tells one sequence of bytes from all others; else an empty string."""
    return etag if ETAG.fullmatch(etag) else ""


def lock_of(path: Path) -> BaseFileLock:
    return FileLock(path, thread_local=False)  # or nobody could leave in place of the thread that took it


def locked(lock: BaseFileLock) -> bool:
    """Whether the lock is ours now; not so too where the file system has none (what older versions raise differs)."""
    try:
        lock.acquire(blocking=False)
    except (NotImplementedError, OSError):  # Timeout is an OSError
        return False
    return True


def has_locks(beside: Path) -> bool:
    """Whether files can be locked in that folder: one at least that nobody else knows."""
    path = beside.with_name(f"{beside.name}.{uuid4().hex}")
    lock = lock_of(path)
    try:
        return locked(lock)
    finally:
        lock.release()
        path.unlink(missing_ok=True)
