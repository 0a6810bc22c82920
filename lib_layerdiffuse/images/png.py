"""PNG files: what of them makes a picture, and the numbers that Pillow cuts or does not find."""

from __future__ import annotations

import logging
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lib_layerdiffuse.images.samples import Values, eight_bits, with_clear

log = logging.getLogger("layerdiffuse")

SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, GREY_ALPHA, RGBA = 0, 2, 4, 6  # colour types; the other one has a palette
MODES = {GREY: "L", RGB: "RGB", GREY_ALPHA: "LA", RGBA: "RGBA"}
TWICE = {GREY: "LA", GREY_ALPHA: "RGBA"}  # two channels of 8 bits are read where one of 16 lies
SHOWING = (b"tRNS", b"iCCP", b"eXIf")  # the ancillary chunks that count: transparency, profile, orientation
MOST_PROFILE = 2**24  # bytes


@dataclass(frozen=True)
class Png:
    """A file taken apart."""

    lean: bytes  # the file without the chunks for which Pillow would refuse a good picture
    depth: int  # bits of a number
    colour: int
    interlaced: int
    compressed: bytes  # all rows
    clear: Values | None  # the one grey or colour that is transparent
    profile: bytes | None  # ICC

    @classmethod
    def of(cls, data: bytes) -> Png:
        """As browsers read it: ancillary chunks of no effect, or with a wrong checksum, might as well not be there.

        Raises ValueError where one that is critical has a wrong checksum.
        """
        depth, colour, _, _, interlaced = data[24:29]
        read_here = (b"iCCP", b"tRNS") if colour in MODES else (b"iCCP",)
        kept, found = [memoryview(SIGNATURE)], defaultdict(list)
        for name, chunk in chunks(data):
            critical, whole = name[:1].isupper(), zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
            if critical and not whole:
                raise ValueError(f"{name!r} is damaged")
            if critical or (whole and name in SHOWING):
                found[name].append(chunk[8:-4])
                kept += [chunk] * (name not in read_here)
        contents = {name: b"".join(found[name]) for name in (b"IDAT", b"tRNS", b"iCCP")}
        return cls(
            b"".join(kept),
            depth,
            colour,
            interlaced,
            contents[b"IDAT"],
            clear_value(contents[b"tRNS"], depth, colour),
            unzipped(contents[b"iCCP"]),
        )

    def pixels(self, image: Image.Image) -> Image.Image:
        """The picture with eight bits a channel. image: `lean` as Pillow opens it."""
        if self.depth == 16:
            values = self._sixteen_bits(image.size)
            pixels = Image.frombytes(MODES[self.colour], image.size, eight_bits(values, 2**16 - 1).tobytes())
        elif self.clear is None:
            image.load()
            return image
        else:
            pixels = image.convert(MODES[self.colour])
            values = np.asarray(pixels).reshape(*image.size[::-1], -1)
        return pixels if self.clear is None else with_clear(pixels, values, self.clear)

    def _sixteen_bits(self, size: tuple[int, int]) -> Values:
        """[H, W, C]"""
        if self.colour in TWICE:
            return self._unpacked(size, TWICE[self.colour], TWICE[self.colour]).view(">u2")
        mode = MODES[self.colour]
        high, low = (self._unpacked(size, mode, f"{mode};16{order}") for order in "BL")  # Pillow keeps one of two bytes
        return high * np.uint16(256) + low

    def _unpacked(self, size: tuple[int, int], mode: str, raw_mode: str) -> Values:
        return np.asarray(Image.frombytes(mode, size, self.compressed, "zip", raw_mode, self.interlaced))


def chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """The name of each chunk up to the last, and the whole of it: length, name, content and checksum."""
    name, start = b"", len(SIGNATURE)
    while start < len(data) and name != b"IEND":
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        name = data[start + 4 : start + 8]
        yield name, memoryview(data)[start:end]
        start = end


def clear_value(content: bytes, depth: int, colour: int) -> Values | None:
    """From a tRNS chunk, on the scale of what Pillow makes of up to eight bits; else on its own."""
    if len(content) != 2 * len(MODES.get(colour, "")) or colour not in (GREY, RGB):
        return None
    value = np.frombuffer(content, ">u2") & (2**depth - 1)
    return value * max(1, 255 // (2**depth - 1))


def unzipped(content: bytes) -> bytes | None:
    """The profile in an iCCP chunk: a name up to a zero, the method of compression, the data."""
    unzip, profile = zlib.decompressobj(), b""
    with suppress(zlib.error):
        profile = unzip.decompress(content.partition(b"\0")[2][1:], MOST_PROFILE)
    if unzip.eof:
        return profile
    if content:
        log.warning("The colour profile of a picture was not used: it is cut, damaged, or larger than any.")
    return None
