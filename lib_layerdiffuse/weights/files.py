"""Weight files here: whether one is whole and the released one, and what is in it."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from operator import index
from pathlib import Path
from typing import TypeAlias

from safetensors import SafetensorError
from safetensors.torch import load_file

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.tensors import StateDict
from lib_layerdiffuse.weights.precision import uniform
from lib_layerdiffuse.weights.released import ASSETS, MB, address_of

log = logging.getLogger("layerdiffuse")

HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
READ = 1 << 22  # bytes at a time, of a file that is here

REPLACE = "Delete it, or put the right file in its place; a missing file is downloaded again."

Report: TypeAlias = Callable[[int, int], None]  # bytes that are done, and bytes expected; may raise to interrupt


def read_tensors(path: Path) -> StateDict:
    """All tensors of a whole file, in one precision; memory-mapped where they have it, so that they take no memory.

    Raises LayerDiffuseError, naming the file, where it is not whole or its numbers cannot be computed with.
    """
    check_whole(path)
    started = time.perf_counter()
    try:
        tensors = uniform(load_file(path))
    except LayerDiffuseError as error:
        raise LayerDiffuseError(f"{path} cannot be used: {error}. {_replace(path)}") from error
    except (OSError, SafetensorError) as error:
        raise LayerDiffuseError(f"{path} cannot be read: {error}. {_replace(path)}") from error
    log.info("read %s (%.0f MB, %.1f s)", path.name, size_of(path) / MB, time.perf_counter() - started)
    return tensors


def fingerprint(path: Path) -> str:
    """Changes when the file does; identity for caches."""
    with _reading(path):
        stat = path.stat()
    return f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}"


def check_whole(path: Path) -> None:
    """Refuse a file that is cut off or no safetensors file, by its header alone. The file itself is left alone."""
    with _reading(path):
        promised = promised_size(path)
    found = size_of(path)
    if promised is None:
        raise LayerDiffuseError(
            f"{path} is no safetensors file, or is cut off within its header: it has {found:,} bytes"
            f"{_expected(path)}. {_replace(path)}"
        )
    if found != promised:
        raise LayerDiffuseError(
            f"{path} is not whole: it has {found:,} bytes and should have {promised:,}. {_replace(path)}"
        )


def promised_size(path: Path) -> int | None:
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


def is_file(path: Path) -> bool:
    """Whether a file is there, and may be seen (`Path.is_file` raises where it may not, in older Pythons)."""
    return os.path.isfile(path)  # noqa: PTH113


def size_of(path: Path) -> int:
    """In bytes; 0 where there is no such file, or none that may be seen."""
    try:
        return path.stat().st_size
    except (OSError, ValueError):  # ValueError: no name that a file can have
        return 0


def compare(path: Path, report: Report) -> None:
    """Log a warning where a file has the name and size of a released one, but other bytes."""
    asset = ASSETS.get(path.name)
    if asset and asset.sha256 and size_of(path) == asset.size and sha256_of(path, report) != asset.sha256:
        warn_of(path)


def warn_of(path: Path) -> None:
    """A warning and no refusal: the hashes are from one source, and somebody may have trained the file further."""
    log.warning(
        "%s has other bytes than the released file: it is somebody's own, or damaged. Where the pictures are wrong, "
        "delete it: the next run downloads it again. The right one has the SHA-256 %s.",
        path,
        ASSETS[path.name].sha256,
    )


def sha256_of(path: Path, report: Report) -> str:
    """Of the whole file. Raises LayerDiffuseError where it cannot be read."""
    digest = hashlib.sha256()
    done, size = 0, size_of(path)
    for piece in _pieces_of(path):
        digest.update(piece)
        done += len(piece)
        report(done, size)
    return digest.hexdigest()


def _pieces_of(path: Path) -> Iterator[bytes]:
    with _reading(path), path.open("rb") as file:
        yield from iter(partial(file.read, READ), b"")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LayerDiffuseError(f"{path} cannot be read: {error}.") from error


def _expected(path: Path) -> str:
    asset = ASSETS.get(path.name)
    return f" where about {asset.megabytes} MB are expected" if asset else ""


def _replace(path: Path) -> str:
    if path.name not in ASSETS:
        return "Delete it and put a whole copy in its place."
    return f"Delete it: the next run downloads it again. By hand, it comes from {address_of(path.name)}."
