"""One weight file on its way into a folder.

huggingface_hub does not do this: in Forge's version nobody hears how far a download is, none can end it, and it appends
to what may be of another file; newer ones throw away what had come. None compares the hash or takes plain mirrors.
"""

import base64
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from math import inf
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import unquote_to_bytes
from urllib.request import Request, urlopen

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.weights.files import Report, promised_size, sha256_of, size_of, warn_of
from lib_layerdiffuse.weights.part import LeftError, Part, strong
from lib_layerdiffuse.weights.released import MB, REVISION, Asset, address_of, endpoint

ANOTHER = "another program is downloading it into the same folder"

log = logging.getLogger("layerdiffuse")

HEADERS = {"User-Agent": "sd-forge-layerdiffuse", "Accept-Encoding": "identity"}
TIMEOUT = 30  # seconds without a byte
PATIENCE = 60  # seconds that a server may ask to wait, all in all
INTERVAL = 0.2  # seconds between two reports while nothing comes
CHUNK = 1 << 18  # bytes at most between two reports
LATEST = "main"  # the revision that a mirror has where it does not have ours
BUSY = (429, 503)


class Transfer:
    """Kept as a part until it is whole, continued after a break, and put in place only then."""

    def __init__(self, asset: Asset, folder: Path, report: Report) -> None:
        self.note = ""  # why nothing comes at the moment
        self._asset = asset
        self._folder = folder
        self._report = report
        self._part = Part(folder, asset.file)
        self._total = asset.size  # bytes expected
        self._pieced = False  # whether what is here did not come in one go
        self._patience: float = PATIENCE
        self._revision = REVISION

    def run(self) -> Path:
        """Fetch the file, or wait for another one who fetches it into the same folder.

        Raises LayerDiffuseError where it does not come, LeftError where it was stopped.
        """
        try:
            self._take()
            return self._present() or self._fetched()
        finally:
            self._part.leave()

    def stop(self) -> None:
        """End it at once, from any thread; what has come is kept."""
        self._part.leave()

    def _take(self) -> None:
        if self._taken():
            return
        self._say(ANOTHER)
        while not self._taken():
            self._wait(INTERVAL)
        self.note = ""

    def _taken(self) -> bool:
        with self._disk():
            return self._part.take()

    def _present(self) -> Path | None:
        """The file, where another one has fetched it."""
        with self._disk():
            if self._part.target.is_file():
                return self._part.target
        if os.path.lexists(self._part.target):
            raise self._error(f"{self._part.target} is there, but is no file", "Move it away")
        return None

    def _fetched(self) -> Path:
        """In a second attempt, where the first was pieced together of what does not belong together."""
        log.info("downloading %s into %s", address_of(self._asset.file), self._folder)
        for _ in range(2):
            self._receive_all()
            right = self._right()
            with self._disk():
                if not right and self._pieced:
                    self._part.drop()
                    continue
                path = self._part.place()
            if not right:
                warn_of(path)
            return path
        raise self._error("what came in pieces is not that file", "Try again")

    def _receive_all(self) -> None:
        """Receive until the part is whole, for as long as every connection brings more of it."""
        size, promised = self._state() if self._vouched() else (0, None)
        self._pieced = size > 0
        while size != promised and not self._receive(size, promised):
            before, (size, promised) = size, self._state()
            if size <= before:
                raise self._error(f"the connection broke off after {size / MB:.1f} MB", "Try again to go on from there")

    def _state(self) -> tuple[int, int | None]:
        """Size of the part, and the size its own header promises once that has arrived."""
        with self._disk():
            size = size_of(self._part.path)
            return size, promised_size(self._part.path) if size else None

    def _receive(self, size: int, promised: int | None) -> bool:
        """Store what one connection brings; whether that is all it announced."""
        response, stored = self._connect(size, promised)
        with response:
            announced = response.headers.get("Content-Length", "")
            total = stored + int(announced) if announced.isdecimal() else None
            self._total = total or self._asset.size
            for piece in pieces(response):
                with self._disk():
                    self._part.write(piece)
                stored += len(piece)
                self._tell(stored)
        self._go_on()
        return stored == total

    def _connect(self, size: int, promised: int | None) -> tuple[Any, int]:
        """An answer and the place where it begins: the end of the part, or 0 where the server cannot go on from it."""
        if not (promised and size < promised and self._vouched()):
            response = self._ask(0)
        elif self._goes_on(response := self._ask(size), f"bytes {size}-{promised - 1}/{promised}"):
            self._pieced = True
            return response, size
        elif response.status != 200:  # of another file, or nothing of any
            response.close()
            response = self._ask(0)
        with self._disk():
            self._part.begin(etag_of(response))
        self._pieced = False
        return response, 0

    def _vouched(self) -> bool:
        """Whether it will be known of what is here if it belongs to what comes: now, or by the hash of it all."""
        return bool(self._part.etag or self._asset.sha256)

    def _goes_on(self, response: Any, wanted: str) -> bool:
        """Whether the answer is the rest of the file that the part is of."""
        etag, kept = etag_of(response), self._part.etag
        same = etag == kept if etag and kept else bool(self._asset.sha256)
        return same and response.headers["Content-Range"] == wanted

    def _ask(self, start: int) -> Any:
        """An answer, after as much waiting as servers may ask for."""
        with self._network():
            try:
                return urlopen(self._request(start), timeout=TIMEOUT)
            except HTTPError as refusal:
                if refusal.code == 416:  # no such range: an answer too
                    return refusal
                refusal.close()
                seconds = self._delay(refusal)
        self._pause(seconds)
        return self._ask(start)

    def _request(self, start: int) -> Request:
        request = Request(address_of(self._asset.file, self._revision), headers=HEADERS)
        if start:
            request.add_header("Range", f"bytes={start}-")
        if start and self._part.etag:
            request.add_header("If-Range", self._part.etag)
        if credentials := endpoint()[1]:
            code = base64.b64encode(unquote_to_bytes(credentials)).decode()
            request.add_unredirected_header("Authorization", f"Basic {code}")  # for that server alone
        return request

    def _delay(self, refusal: HTTPError) -> float:
        """Seconds after which it makes sense to ask again. Raises where it makes none."""
        if refusal.code == 404 and self._revision != LATEST:
            self._revision = LATEST
            return 0
        seconds = retry_after(refusal) if refusal.code in BUSY else inf
        if seconds == inf:
            raise refusal
        if seconds > self._patience:
            raise self._error(f"{refusal}, for {seconds:.0f} s more", "Try again then")
        self._patience -= seconds
        return seconds

    def _pause(self, seconds: float) -> None:
        if not seconds:
            return
        self._say(f"the server asks to wait {seconds:.0f} s")
        end = time.monotonic() + seconds
        while (rest := end - time.monotonic()) > 0:
            self._wait(min(rest, INTERVAL))
        self.note = ""

    def _right(self) -> bool:
        """Whether it has the hash that is known, if one is. Raises where it is no whole safetensors file."""
        size, promised = self._state()
        if size != promised:
            with self._disk():
                self._part.drop()
            raise self._error(f"the {size:,} bytes that came are not that file", "Try again")
        if not self._asset.sha256:
            return True
        found = sha256_of(self._part.path, lambda done, size: self._tell(size))
        return found == self._asset.sha256

    def _say(self, note: str) -> None:
        self.note = note
        log.warning("%s: %s", self._asset.file, note)

    def _wait(self, seconds: float) -> None:
        self._tell(size_of(self._part.path))
        self._part.left.wait(seconds)

    def _tell(self, received: int) -> None:
        self._go_on()
        self._report(received, self._total)

    def _go_on(self) -> None:
        if self._part.left.is_set():
            raise LeftError

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: the folder's name is none
            advice = "Make room or allow writing there, or name another folder with --layerdiffuse-models-dir"
            raise self._error(f"{self._folder} cannot be written to: {error}", advice) from error

    @contextmanager
    def _network(self) -> Iterator[None]:
        try:
            yield
        except (OSError, HTTPException, OverflowError, ValueError) as error:  # the last two: HF_ENDPOINT is no address
            raise self._error(str(error), "Check the connection, or name a mirror in HF_ENDPOINT") from error

    def _error(self, problem: str, advice: str) -> LayerDiffuseError:
        return LayerDiffuseError(
            f"{self._asset.file} could not be downloaded: {problem}. {advice}. "
            f"Or download {address_of(self._asset.file)} by hand and put it into {self._folder}."
        )


def pieces(response: Any) -> Iterator[bytes]:
    """The body, each piece as soon as it is there; a connection that breaks ends it early."""
    with suppress(OSError, HTTPException):
        while piece := response.read1(CHUNK):
            yield piece


def etag_of(response: Any) -> str:
    return strong(response.headers["ETag"] or "")


def retry_after(refusal: HTTPError) -> float:
    """Seconds that the server asks to wait, at least one; infinity where it does not ask."""
    value = refusal.headers["Retry-After"] or ""
    if value.isdecimal():
        return max(1.0, float(value))
    try:
        return max(1.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):  # as older and newer Pythons say that it is no date
        return inf
