"""Files by their paths: pictures read, and anything written whole or not at all, and never unasked over another."""

from __future__ import annotations

import io
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

from PIL import Image

from lib_layerdiffuse.errors import LayerDiffuseError

Formats: TypeAlias = Mapping[str, tuple[str, Mapping[str, Any]]]  # by a file's ending: Pillow's name for it, and how

LOSSLESS: Formats = {  # with alpha, and with the colour under it
    ".png": ("PNG", {}),
    ".webp": ("WEBP", {"lossless": True, "exact": True}),
    ".tif": ("TIFF", {}),
    ".tiff": ("TIFF", {}),
}
FOR_OPAQUE: Formats = {**LOSSLESS, ".jpg": ("JPEG", {"quality": 95}), ".jpeg": ("JPEG", {"quality": 95})}


class Taken(LayerDiffuseError):
    """Something is where a new file should be."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} is there already. Name another file, or add --overwrite.")


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """While open, an OSError is the sentence for a file that cannot be read."""
    try:
        yield
    except FileNotFoundError as error:
        raise LayerDiffuseError(f"No such file: {path}. Choose one that is there.") from error
    except OSError as error:
        raise LayerDiffuseError(f"{path} cannot be read: {error.strerror or error}.") from error


def content_of(image: Image.Image, ending: str, formats: Formats = LOSSLESS) -> bytes:
    """What a file of that ending holds of the image."""
    name, options = formats[ending.lower()]
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def check_target(path: Path, endings: Collection[str], content: str, overwrite: bool) -> None:
    """Raises LayerDiffuseError where that content cannot be written there, as far as can be said beforehand."""
    if path.suffix.lower() not in endings:
        raise LayerDiffuseError(f"{path} cannot hold {content}. Choose a name that ends in {' or '.join(endings)}.")
    if not overwrite and os.path.lexists(path):
        raise Taken(path)
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Raises LayerDiffuseError where nothing can be written into it, or it cannot be made."""
    nearest = next(filter(os.path.lexists, (folder, *folder.absolute().parents)), folder)
    if not nearest.is_dir():
        raise LayerDiffuseError(f"{nearest} is no folder. Choose another place to write to.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise LayerDiffuseError(f"{nearest} may not be written to. Allow it, or choose another place.")


def write(contents: Mapping[Path, bytes], overwrite: bool = False) -> None:
    """All of these files, or none: each is written beside its place, and goes there when all are whole.

    Raises Taken where there is one already, unless `overwrite` says to replace it; LayerDiffuseError where the disk
    fails.
    """
    parts = {path.resolve(): path.resolve().with_name(f".{uuid4().hex}.part") for path in contents}
    claimed: list[Path] = []
    try:
        for (path, part), content in zip(parts.items(), contents.values()):
            with _disk(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                part.write_bytes(content)
        for path in () if overwrite else parts:
            with _disk(path):
                _claim(path)
            claimed.append(path)
        for path, part in parts.items():
            with _disk(path):
                part.replace(path)
    except BaseException:  # Ctrl-C too
        for left in (*parts.values(), *claimed):
            with suppress(OSError):  # what failed first is what is said
                left.unlink()
        raise


def write_free(folder: Path, stem: str, contents: Mapping[str, bytes]) -> list[Path]:
    """Files that belong together, named by the stem and their endings: 000000-fg.png; again, 000000-2-fg.png.

    The first number at which none of them is taken. Answers where they are. Raises LayerDiffuseError.
    """
    for number in count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        files = {folder / f"{name}{ending}": content for ending, content in contents.items()}
        if any(map(os.path.lexists, files)):
            continue
        with suppress(Taken):  # by another process, just now
            write(files)
            break
    return list(files)


def _claim(path: Path) -> None:
    """An empty file, so that nobody else takes the name: a rename alone would replace theirs."""
    try:
        path.open("xb").close()
    except FileExistsError as error:
        raise Taken(path) from error


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LayerDiffuseError(
            f"{path} cannot be written: {error.strerror or error}. Make room or allow it, or choose another place."
        ) from error
