"""Pictures that people give, whichever way they come in: upright, in sRGB, with eight bits a channel."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.encoding import decoded
from lib_layerdiffuse.images.png import SIGNATURE, Png
from lib_layerdiffuse.images.profiles import to_srgb
from lib_layerdiffuse.images.samples import Unclear, is_cut, narrowed, uncut

MAX_PIXELS = 100_000_000  # of an image sent: a small file may hold more than fits into memory
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # of images sent; others make Pillow start programs
CUT_BY_PILLOW = ("PNG", "TIFF")  # formats that hold more than it reads

ORIENTATION = 0x0112  # Exif 2.32, 4.6.4
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class TooLarge(ValueError):
    """An image of more pixels than allowed."""

    def __init__(self, most: int) -> None:
        super().__init__(f"has more than {most:,} pixels, which is the limit. Choose a smaller image.")


REFUSALS = (TooLarge, Unclear)  # of images that are whole: each says why, to be read after the image's name


class Opened(NamedTuple):
    """A picture as its file has it."""

    pixels: Image.Image  # eight bits a channel, of any mode
    profile: bytes | None  # ICC
    orientation: int


def read_image(raw: Any, most: int = MAX_PIXELS) -> Image.Image:
    """An image, L or RGB, or RGBA where it can be transparent, from what panels, API calls and command lines have.

    raw: an array [H, W, 3 or 4] of bytes, a PIL image, base64, a data URL, or a file, its path or its bytes. Of an
    animation, the first picture. The image is upright and in sRGB, and keeps nothing else of its file.
    Raises TooLarge for a file that holds more than `most` pixels, before they are decoded; Unclear where its numbers do
    not say what is white; any other ValueError where it is none of these, or not whole; OSError for a path.
    """
    if isinstance(raw, Path):
        raw = raw.read_bytes()
    try:
        pixels, profile, orientation = _opened(raw, most)
        return _plain(pixels.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else pixels, profile)
    except REFUSALS:
        raise
    except Image.DecompressionBombError as error:  # Pillow has a limit too
        raise TooLarge(most) from error
    except Exception as error:  # Pillow has many for damaged files: SyntaxError, struct.error …
        raise ValueError("not an image") from error


def read_file(path: Path, most: int = MAX_PIXELS) -> Image.Image:
    """`read_image` of a file that a person named. Raises LayerDiffuseError."""
    try:
        return read_image(path, most)
    except FileNotFoundError as error:
        raise LayerDiffuseError(f"No such file: {path}. Choose one that is there.") from error
    except OSError as error:
        raise LayerDiffuseError(f"{path} cannot be read: {error.strerror or error}.") from error
    except REFUSALS as error:
        raise LayerDiffuseError(f"{path} {error}") from error
    except ValueError as error:
        raise LayerDiffuseError(f"{path} is not a whole picture. Choose a file of {', '.join(FORMATS)}.") from error


def can_be_transparent(image: Image.Image) -> bool:
    return image.getbands()[-1] in "Aa" or "transparency" in image.info


def _opened(raw: Any, most: int) -> Opened:
    if isinstance(raw, np.ndarray):
        raw = Image.fromarray(raw)
    data = _unread(raw) if isinstance(raw, Image.Image) else raw if isinstance(raw, bytes) else decoded(raw)
    if data is None:
        return Opened(narrowed(raw), raw.info.get("icc_profile"), _orientation(raw))
    png = Png.of(data) if data.startswith(SIGNATURE) else None
    image = _image(png.lean if png else data, most)
    if png:
        return Opened(png.pixels(image), png.profile, _orientation(image))
    pixels = uncut(image, _image(data, most)) if is_cut(image) else narrowed(image)
    return Opened(pixels, image.info.get("icc_profile"), _orientation(image))


def _unread(image: Image.Image) -> bytes | None:
    """The file of an image that was opened, but not read yet, where Pillow would read less than is in it."""
    if not isinstance(image, ImageFile.ImageFile) or image.format not in CUT_BY_PILLOW:
        return None
    if not image.tile or image.tell():  # read, or not the first picture
        return None
    file: Any = image.fp
    place = file.tell()
    file.seek(0)
    data: bytes = file.read()
    file.seek(place)
    return data


def _image(data: bytes, most: int) -> Image.Image:
    """The image in a file, not read yet."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > most:
        raise TooLarge(most)
    return image


def _orientation(image: Image.Image) -> int:
    """What the camera wrote; 1, which is upright, where it wrote none that could be read."""
    if image.format == "TIFF":  # turned by Pillow as it is read
        return 1
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged in as many ways as files are; the picture is whole
        return 1


def _plain(pixels: Image.Image, profile: bytes | None) -> Image.Image:
    """As all else takes pictures, without what else was known of it."""
    if 0 in pixels.size:
        raise ValueError("no pixels")
    if pixels.mode == "La":  # of which Pillow knows this way only
        pixels = pixels.convert("LA")
    alpha = pixels.convert("RGBA").getchannel("A") if can_be_transparent(pixels) else None
    if pixels.mode in ("1", "L", "LA"):
        pixels = pixels.convert("L")
    elif pixels.mode != "CMYK":
        pixels = pixels.convert("RGBA" if alpha else "RGB").convert("RGB")
    plain = to_srgb(pixels, profile)
    if alpha:
        plain = plain.convert("RGB")
        plain.putalpha(alpha)
    plain.info = {}
    return plain
