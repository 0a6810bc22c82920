"""The released weight files: which there are, where they come from, whether one is whole, and what is in it."""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from operator import index
from pathlib import Path
from typing import TypeAlias

from safetensors import SafetensorError
from safetensors.torch import load_file

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.precision import uniform
from lib_layerdiffuse.tensors import StateDict

LOG = logging.getLogger("layerdiffuse")

REPOSITORY = "LayerDiffusion/layerdiffusion-v1"
REVISION = "e337e9d7a0f2a6fee6c3580374327380f88d065b"  # of the repository, which the hashes below belong to
ENDPOINT = "https://huggingface.co"  # unless HF_ENDPOINT names a mirror
HEADER_LIMIT = 100_000_000  # bytes; the format's own limit
READ = 1 << 22  # bytes at a time, of a file that is here
MB = 1_000_000

REPLACE = "Delete it, or put the right file in its place; a missing file is downloaded again."

Report: TypeAlias = Callable[[int, int], None]  # bytes that are done, and bytes expected; may raise to interrupt


@dataclass(frozen=True)
class Asset:
    """One released file: its size in bytes, and its SHA-256 where that is known."""

    file: str
    size: int
    sha256: str = ""

    @property
    def megabytes(self) -> int:
        return round(self.size / MB)


# Name, size, SHA-256. The hashes are from one source, the sizes from lists of the repository, or counted from the
# layouts, which give the listed ones exactly.
_RELEASED = """
layer_sd15_transparent_attn         350266608 cc9ee87452bf1ccdd419035bf9618f6bdcaac1a2d3e23694d62e5a9c721da295
layer_sd15_joint                    554404208 2cc81c33c1a786bdc376c6d1bfb43dbdffda2f610f7c6b4ebd776505a29712bd
layer_sd15_fg2bg                    562982312 5bade856ec3e55d6ceb0e35bbc97cea7fa4953f7776c8032f2fe52ba740ed580
layer_sd15_bg2fg                    562982312 8367f976da1cc4275e513c7fb40f977ca312e79e720d7db7ae94978a9359fb62
layer_xl_transparent_attn           743352688 b7919c5b4837fb64f24c97a7abdf1a9c6e8d60de080a5dae089dde098266df95
layer_xl_transparent_conv          3619745776 5ee958d80dcd515fa7ac915274c536fadd3db5d919adeb5ff45107b6169aacc7
layer_xl_fg2ble                     701981624 50a29851ad56308f14d6c9ed375be17df6921efeca240b31f567f6b8c76d1e70
layer_xl_bg2ble                     701981624 2901d1353cc4ca763c8bedc48453b36e88680605f417c7f7ec730a7c36845d7c
layer_xl_fgble2bg                   702004664 179a61fdcdb149af1897b2840f24ba09466ab6265b2c792b0e99df557f0439be
layer_xl_bgble2fg                  3619791856 1688f0c17447f74662686fadd431f24d26a1ba8ffea322c6f56c8b5ed581b78d
vae_transparent_decoder             208266320 59dc8feefe40d26b6cb7186aed7af70c60d94ac4f9db8ebe7f121a01ba27a2fc
layer_sd15_vae_transparent_decoder  208266320 6df4712dfbb3783231b22f869a5da5cbfea782ebb05f782bd9e8744bfb0cdf03
vae_transparent_encoder               2365008
layer_sd15_vae_transparent_encoder    2365008
"""


def _asset(name: str, size: str, sha256: str = "") -> Asset:
    return Asset(f"{name}.safetensors", int(size), sha256)


ASSETS = {asset.file: asset for asset in (_asset(*row.split()) for row in _RELEASED.strip().splitlines())}


def endpoint() -> tuple[str, str]:
    """Where the files come from, and `user:password` for it: what stands in front of the last @, shown to nobody."""
    text = (os.environ.get("HF_ENDPOINT") or ENDPOINT).strip().rstrip("/")
    scheme, mark, rest = text.partition("://")
    credentials, _, place = (rest if mark else text).rpartition("@")
    return (scheme + mark if mark else "") + place, credentials


def address_of(file: str, revision: str = REVISION) -> str:
    """Where a released file can be downloaded."""
    return f"{endpoint()[0]}/{REPOSITORY}/resolve/{revision}/{file}"


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
    LOG.info("read %s (%.0f MB, %.1f s)", path.name, size_of(path) / MB, time.perf_counter() - started)
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
    LOG.warning(
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
