"""The released weight files: where they are, how they get here, and whether they are whole."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from operator import index
from pathlib import Path
from typing import Any, TypeAlias
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from safetensors import SafetensorError
from safetensors.torch import load_file

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.tensors import StateDict

LOG = logging.getLogger("layerdiffuse")

REPOSITORY = "LayerDiffusion/layerdiffusion-v1"
ENDPOINT = "https://huggingface.co"  # unless HF_ENDPOINT names a mirror
HEADERS = {"User-Agent": "sd-forge-layerdiffuse", "Accept-Encoding": "identity"}
TIMEOUT = 30  # seconds without a byte
CHUNK = 1 << 18  # bytes; small enough that an interrupt is felt on a slow line
HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
MB = 1_000_000

REPLACE = "Delete it, or put the right file in its place; a missing file is downloaded again."

Report: TypeAlias = Callable[[int, int], None]  # bytes that are here, and bytes expected; may raise to interrupt


@dataclass(frozen=True)
class Asset:
    """One released file. The hash is checked where it is known, and stays empty until someone computed it."""

    file: str
    megabytes: int
    sha256: str = ""


_ROWS = (
    Asset("layer_sd15_transparent_attn.safetensors", 350),
    Asset("layer_sd15_joint.safetensors", 554),
    Asset("layer_sd15_fg2bg.safetensors", 563),
    Asset("layer_sd15_bg2fg.safetensors", 563),
    Asset("layer_xl_transparent_attn.safetensors", 743),
    Asset("layer_xl_transparent_conv.safetensors", 3620),
    Asset("layer_xl_fg2ble.safetensors", 702),
    Asset("layer_xl_bg2ble.safetensors", 702),
    Asset("layer_xl_fgble2bg.safetensors", 702),
    Asset("layer_xl_bgble2fg.safetensors", 3620),
    Asset("vae_transparent_decoder.safetensors", 208),
    Asset("layer_sd15_vae_transparent_decoder.safetensors", 208),
    Asset("vae_transparent_encoder.safetensors", 2),
    Asset("layer_sd15_vae_transparent_encoder.safetensors", 2),
)
ASSETS = {row.file: row for row in _ROWS}


def address_of(file: str) -> str:
    """Where a released file can be downloaded."""
    endpoint = os.environ.get("HF_ENDPOINT") or ENDPOINT
    return f"{endpoint.rstrip('/')}/{REPOSITORY}/resolve/main/{file}"


@dataclass(frozen=True)
class WeightLibrary:
    """The folders that may hold weight files, searched in order; downloads go into the first."""

    folders: Sequence[Path]

    def find(self, file: str) -> Path | None:
        """The file in the first folder that has it."""
        return next((path for folder in self.folders if (path := folder / file).is_file()), None)

    def obtain(self, file: str, report: Report) -> Path:
        """The file, downloaded first if no folder has it. One that is there is the user's and never replaced."""
        return self.find(file) or _Download(ASSETS[file], self.folders[0], report).run()

    def received(self, file: str) -> int:
        """Bytes of a download of the file that is not finished."""
        return _size(part_of(self.folders[0], file))


def part_of(folder: Path, file: str) -> Path:
    """Where a download into the folder is kept until it is whole."""
    return folder / f"{file}.part"


def read_tensors(path: Path) -> StateDict:
    """All tensors of a whole file, memory-mapped: pages are read when first used."""
    check_whole(path)
    started = time.perf_counter()
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise LayerDiffuseError(f"{path} cannot be read: {error}. {_replace(path)}") from error
    LOG.info("read %s (%.0f MB, %.1f s)", path.name, _size(path) / MB, time.perf_counter() - started)
    return tensors


def fingerprint(path: Path) -> str:
    """Changes when the file does; identity for caches."""
    stat = path.stat()
    return f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}"


def check_whole(path: Path) -> None:
    """Refuse a file that is cut off or no safetensors file, by its header alone. The file itself is left alone."""
    try:
        promised = _promised_size(path)
    except OSError as error:
        raise LayerDiffuseError(f"{path} cannot be read: {error}.") from error
    found = _size(path)
    if promised is None:
        raise LayerDiffuseError(
            f"{path} is no safetensors file, or is cut off within its header: it has {found:,} bytes"
            f"{_expected(path)}. {_replace(path)}"
        )
    if found != promised:
        raise LayerDiffuseError(
            f"{path} is not whole: it has {found:,} bytes and should have {promised:,}. {_replace(path)}"
        )


def _promised_size(path: Path) -> int | None:
    """The file length that the header promises; None where there is no complete safetensors header.

    Layout: header length (8 bytes, little-endian), header (JSON), tensor data; offsets count from the header's end.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > HEADER_LIMIT:
            return None
        text = file.read(length)
    with suppress(AttributeError, LookupError, RecursionError, TypeError, ValueError):
        rows = json.loads(text)  # any of these exceptions: not JSON, or JSON of something else
        ends = [row["data_offsets"][1] for name, row in rows.items() if name != "__metadata__"]
        return 8 + length + index(max(ends, default=0))
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _expected(path: Path) -> str:
    asset = ASSETS.get(path.name)
    return f" where about {asset.megabytes} MB are expected" if asset else ""


def _replace(path: Path) -> str:
    if path.name not in ASSETS:
        return "Delete it and put a whole copy in its place."
    return f"Delete it: the next run downloads it again. By hand, it comes from {address_of(path.name)}."


@dataclass(frozen=True)
class _Download:
    """One file on its way into a folder: kept as `.part`, continued after a break, put in place only when whole."""

    asset: Asset
    folder: Path
    report: Report

    @property
    def address(self) -> str:
        return address_of(self.asset.file)

    @property
    def part(self) -> Path:
        return part_of(self.folder, self.asset.file)

    def run(self) -> Path:
        """Receive until the part is whole, for as long as every connection brings more of it."""
        LOG.info("downloading %s into %s", self.address, self.folder)
        with self._disk():
            self.folder.mkdir(parents=True, exist_ok=True)
        size, promised = self._state()
        while size != promised and not self._receive(size, promised):
            before, (size, promised) = size, self._state()
            if size <= before:
                raise self._error(f"the connection broke off after {size / MB:.1f} MB", "Try again to go on from there")
        return self._put_in_place()

    def _state(self) -> tuple[int, int | None]:
        """Size of the part, and the size its own header promises once that has arrived."""
        with self._disk():
            return (_size(self.part), _promised_size(self.part)) if self.part.exists() else (0, None)

    def _receive(self, size: int, promised: int | None) -> bool:
        """Store what one connection brings; whether that is all it announced."""
        with self._network():
            response, stored = self._connect(size, promised)
        with response:
            announced = response.headers.get("Content-Length", "")
            total = stored + int(announced) if announced.isdecimal() else None
            for piece in _pieces(response):
                self._store(piece, stored)
                stored += len(piece)
                self.report(stored, total or self.asset.megabytes * MB)
        return stored == total

    def _connect(self, size: int, promised: int | None) -> tuple[Any, int]:
        """An answer and the place where it begins: the end of the part, or 0 where the server cannot go on from it."""
        start = size if promised and size < promised else 0
        response = self._ask(start)
        if promised and response.headers["Content-Range"] == f"bytes {start}-{promised - 1}/{promised}":
            return response, start
        if response.status == 200:  # nothing to go on from, or the server knows no ranges
            return response, 0
        response.close()  # the server has a file of another size
        return self._ask(0), 0

    def _ask(self, start: int) -> Any:
        headers = HEADERS | ({"Range": f"bytes={start}-"} if start else {})
        try:
            return urlopen(Request(self.address, headers=headers), timeout=TIMEOUT)
        except HTTPError as answer:
            if answer.code == 416:  # no such range: an answer too
                return answer
            answer.close()
            raise

    def _store(self, piece: bytes, start: int) -> None:
        with self._disk(), self.part.open("ab") as file:
            file.truncate(start)
            file.write(piece)

    def _put_in_place(self) -> Path:
        """Rename the part, or drop it where it is not what it should be, or somebody put the file there meanwhile."""
        target = self.folder / self.asset.file
        size, promised = self._state()
        known = self.asset.sha256
        with self._disk():
            present = target.exists()
            if not present and size == promised and (not known or known == _sha256(self.part)):
                return self.part.replace(target)
            self.part.unlink(missing_ok=True)
        if present:
            return target
        raise self._error(f"the {size:,} bytes that came are not that file", "Try again")

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            advice = "Make room or allow writing there, or name another folder with --layerdiffuse-models-dir"
            raise self._error(f"{self.folder} cannot be written to: {error}", advice) from error

    @contextmanager
    def _network(self) -> Iterator[None]:
        try:
            yield
        except (OSError, HTTPException, ValueError) as error:  # ValueError: HF_ENDPOINT is no address
            raise self._error(str(error), "Check the connection, or name a mirror in HF_ENDPOINT") from error

    def _error(self, problem: str, advice: str) -> LayerDiffuseError:
        return LayerDiffuseError(
            f"{self.asset.file} could not be downloaded: {problem}. {advice}. "
            f"Or download {self.address} by hand and put it into {self.folder}."
        )


def _pieces(response: Any) -> Iterator[bytes]:
    """The body piece by piece; a connection that breaks ends it early."""
    with suppress(OSError, HTTPException):
        while piece := response.read(CHUNK):
            yield piece


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for piece in iter(partial(file.read, CHUNK), b""):
            digest.update(piece)
    return digest.hexdigest()
