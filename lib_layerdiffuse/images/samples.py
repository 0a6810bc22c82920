"""Numbers wider than eight bits, as picture files hold them, brought to eight: rounded, where Pillow cuts."""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

Values: TypeAlias = np.ndarray[Any, np.dtype[Any]]

BITS, PHOTOMETRIC, EXTRA = 258, 262, 338  # TIFF's tags
WHITE_IS_ZERO, PREMULTIPLIED = 0, (1,)
OTHER_ORDER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}  # little, big, the machine's


class Unclear(ValueError):
    """An image whose numbers do not say what is white."""

    def __init__(self, mode: str, low: float, high: float) -> None:
        super().__init__(
            f"has numbers from {low:g} to {high:g} (mode {mode}), which do not say what is white. "
            "Save it with 8 or 16 bits a channel."
        )


def eight_bits(values: Values, white: float) -> Values:
    """0..white to the nearest of 0..255."""
    return (values.astype(np.float32) * (255 / white)).round().astype(np.uint8)


def with_clear(pixels: Image.Image, values: Values, clear: Any) -> Image.Image:
    """The pixels, transparent where all channels of their values [H, W, C] are those of `clear`."""
    alpha = (values != clear).any(axis=2)
    pixels = pixels.convert("LA" if pixels.mode == "L" else "RGBA")
    pixels.putalpha(Image.fromarray(255 * alpha.astype(np.uint8)))
    return pixels


def narrowed(image: Image.Image) -> Image.Image:
    """An image of one channel of wide numbers as L or LA; any other as it is. Raises Unclear."""
    image.load()
    if image.mode[0] not in "IF":
        return image
    values = np.asarray(image)
    low, high, white = values.min(), values.max(), white_of(image)
    if not 0 <= low <= high <= white:  # NaN compares false
        raise Unclear(image.mode, low, high)
    if tags_of(image).get(PHOTOMETRIC) == WHITE_IS_ZERO:
        values = white - values
    pixels = Image.fromarray(eight_bits(values, white))
    clear = image.info.get("transparency")
    return pixels if clear is None else with_clear(pixels, values[..., None], clear)


def white_of(image: Image.Image) -> float:
    """The number that means white; -1 for TIFF's signed and 32-bit integers, for which there is no custom."""
    if image.mode == "F":
        return 1
    if image.mode == "I":  # also what Pillow 9.5 makes of 16 bits
        return -1 if image.format == "TIFF" else 2**16 - 1
    return 2 ** tags_of(image).get(BITS, (16,))[0] - 1


def tags_of(image: Image.Image) -> Any:
    return getattr(image, "tag_v2", {})


# --- TIFF's channels of 16 bits ---


def is_cut(image: Image.Image) -> bool:
    """Whether this is a TIFF of which Pillow leaves out the lower half of every number."""
    return image.format == "TIFF" and len(image.getbands()) > 1 and tags_of(image).get(BITS, (8,))[0] == 16


def uncut(image: Image.Image, again: Image.Image) -> Image.Image:
    """Such a file, opened twice and not read yet."""
    premultiplied = tags_of(image).get(EXTRA) == PREMULTIPLIED
    high, low = halves(image, lower=False), halves(again, lower=True)
    values = high * np.uint16(256) + low
    if premultiplied:
        color, alpha = values[..., :3], values[..., 3:]
        values = np.concatenate([color / np.maximum(alpha, 1) * 65535, alpha], axis=2).clip(0, 65535)
    return Image.frombytes(image.mode, image.size, eight_bits(values, 65535).tobytes())


def halves(image: Image.Image, lower: bool) -> Values:
    """Eight of each number's bits. Pillow takes the first byte of two or the second, by the order said to it."""

    def taking(tile: Any) -> Any:
        channels, _, order = tile[3][0].partition(";16")
        order = order or ("L" if tags_of(image).prefix == b"II" else "B")  # one channel after the other
        args = (f"{channels.upper()};16{OTHER_ORDER[order] if lower else order}", *tile[3][1:])
        return tile._replace(args=args) if hasattr(tile, "_replace") else (*tile[:3], args)

    image.tile = [taking(tile) for tile in image.tile]  # type: ignore[attr-defined]
    image.load()
    return np.asarray(image)
