"""Downloads of weight files that anybody can start, follow and end. A file has one at a time, which all follow."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from threading import Event, Lock, Thread

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.methods import listed, nearest, shortened
from lib_layerdiffuse.weights.files import compare, fingerprint, size_of
from lib_layerdiffuse.weights.library import WeightLibrary
from lib_layerdiffuse.weights.part import LeftError
from lib_layerdiffuse.weights.released import ASSETS, MB, Asset

log = logging.getLogger("layerdiffuse")

INTERVAL = 0.2  # seconds between two looks at a download that is waited for

Progress = Callable[[str, float], None]  # what is going on, and the fraction done; may raise to interrupt


class State(str, Enum):
    """What there is of a weight file."""

    PRESENT = "present"
    MISSING = "missing"
    DOWNLOADING = "downloading"
    FAILED = "failed"


@dataclass(frozen=True)
class Status:
    """A weight file at this moment."""

    asset: Asset
    state: State
    received: int  # bytes here: of the file, of a download under way, or of one broken off, which goes on from there
    total: int  # bytes expected
    error: str  # the sentence, where a download failed
    note: str = ""  # why nothing comes at the moment

    @property
    def fraction(self) -> float:
        """How much of it is here, from 0 to 1."""
        return min(self.received / self.total, 1.0) if self.total else 1.0

    def __str__(self) -> str:
        """A line for a progress bar."""
        note = f" ({self.note})" if self.note else ""
        return f"Downloading {self.asset.file}: {self.received / MB:.0f} of {self.total / MB:.0f} MB{note}"


class Downloads:
    """The downloads of one program; all methods can be called from any thread."""

    def __init__(self, folders: Callable[[], Sequence[Path]]) -> None:
        """folders: may hold weight files; asked each time. The first is where downloads go."""
        self._folders = folders
        self._runs: dict[str, _Run] = {}  # the latest of each file
        self._compared: set[str] = set()  # fingerprints of files whose hash was looked at
        self._lock = Lock()

    def status(self, file: str) -> Status:
        """What there is of the file. Raises LayerDiffuseError where it is none of ours."""
        asset = find_asset(file)
        library = WeightLibrary(self._folders())
        run = self._runs.get(file)
        state = run.state if run else State.MISSING  # first: a run that ends from here on leaves the file to be found
        if path := library.find(file):
            size = size_of(path)
            return Status(asset, State.PRESENT, size, size, "")
        if run and state is State.DOWNLOADING:
            return Status(asset, state, run.received, run.total, "", run.note)
        error = run.error if run and state is State.FAILED else ""
        return Status(asset, state, library.received(file), run.total if run else asset.size, error)

    def start(self, file: str) -> Status:
        """Download the file in the background, unless it is here or on its way. Raises as `status` does."""
        if self.status(file).state is not State.PRESENT:
            self._join(file)
        return self.status(file)

    def cancel(self, file: str) -> Status:
        """End a download under way, whoever waits for it; what has come is kept. Raises as `status` does."""
        find_asset(file)
        with self._lock:
            if run := self._runs.get(file):
                run.stop()
        return self.status(file)

    def obtain(self, file: str, report: Progress) -> Path:
        """Wait until the file is here, downloaded first where it is missing.

        report: hears of the progress, and ends the wait by raising; then the download ends too, unless somebody else
        wants it. Raises LayerDiffuseError where it fails or is cancelled.
        """
        find_asset(file)
        library = WeightLibrary(self._folders())
        if path := library.find(file):
            self._compare(path, report)
            return path
        run = self._join(file)
        try:
            while run.state is State.DOWNLOADING:
                status = self.status(file)
                report(str(status), status.fraction)
                run.done.wait(INTERVAL)
        except BaseException:
            self._leave(run)
            raise
        if path := library.find(file):
            return path
        raise LayerDiffuseError(run.error or f"The download of {file} was cancelled. The next one goes on from there.")

    def _compare(self, path: Path, report: Progress) -> None:
        """Once for each file: a warning where it is not what was released."""
        identity = fingerprint(path)
        with self._lock:
            if identity in self._compared:
                return
            self._compared.add(identity)
        try:
            compare(path, lambda done, size: report(f"Checking {path.name}", done / size))
        except BaseException:  # interrupted: the next one looks
            self._compared.discard(identity)
            raise

    def _join(self, file: str) -> _Run:
        """The download under way, with one more who wants it; a new one where there is none."""
        with self._lock:
            run = self._runs.get(file)
            if run is None or run.state is not State.DOWNLOADING:
                run = self._runs[file] = _Run(file, WeightLibrary(self._folders()), self._compared)
            run.wanted += 1
            return run

    def _leave(self, run: _Run) -> None:
        with self._lock:
            run.wanted -= 1
            if run.wanted == 0:
                run.stop()


class _Run:
    """One download in a thread of its own."""

    def __init__(self, file: str, library: WeightLibrary, compared: set[str]) -> None:
        """compared: takes the fingerprint of what came, whose hash the download has looked at."""
        self.file = file
        self.received, self.total = library.received(file), ASSETS[file].size
        self.error = ""
        self.wanted = 0
        self.stopped = Event()  # somebody wants it to end
        self.done = Event()  # the thread has ended
        self._transfer = library.transfer(file, self._progress)
        Thread(target=self._run, args=(compared,), daemon=True, name=f"download {file}").start()

    @property
    def state(self) -> State:
        """Of the file, where it is not present."""
        if self.stopped.is_set():
            return State.MISSING
        if not self.done.is_set():
            return State.DOWNLOADING
        return State.FAILED if self.error else State.MISSING

    @property
    def note(self) -> str:
        return self._transfer.note

    def stop(self) -> None:
        """From here on another one can have the file, even if the thread hangs in its connection for a while."""
        self.stopped.set()
        self._transfer.stop()

    def _run(self, compared: set[str]) -> None:
        try:
            compared.add(fingerprint(self._transfer.run()))
        except LeftError:
            log.info("the download of %s was cancelled", self.file)
        except Exception as error:  # whatever it is, those who wait must hear of it
            log.warning("%s", error, exc_info=not isinstance(error, LayerDiffuseError))
            self.error = str(error) or repr(error)
        finally:
            self.done.set()

    def _progress(self, received: int, total: int) -> None:
        self.received, self.total = received, total


def find_asset(file: str) -> Asset:
    """The weight file of this name. Raises LayerDiffuseError, with the nearest right name."""
    if asset := ASSETS.get(file):
        return asset
    raise LayerDiffuseError(f"There is no weight file {shortened(file)}. Did you mean {listed(nearest(file, ASSETS))}?")
