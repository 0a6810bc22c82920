"""Picture files whose numbers have more than eight bits, and others that Pillow itself does not write."""

import struct
import zlib

import numpy as np

from tests.odd_files import chunk

# Adam7: of each pass, the first column and row, and the steps to the next ones.
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def png_of_values(values: np.ndarray, colour: int, *more: bytes, depth: int = 16, interlaced: bool = False) -> bytes:
    """A PNG file of values [H, W, C], of 8 or 16 bits or packed before. more: chunks in front of the pixels."""
    height, width = values.shape[:2]
    parts = [values[y::down, x::right] for x, y, right, down in PASSES] if interlaced else [values]
    rows = [row for part in parts if part.size for row in part.astype(">u2" if depth == 16 else "u1")]
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    kept = [chunk(b"IHDR", header), *more, chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(kept)


def tiff_of_values(values: np.ndarray, photometric: int, *, order: str = "<", planar: bool = False,
                   bits: int = 0, **tags: int) -> bytes:  # fmt: skip
    """An uncompressed TIFF file of values [H, W, C] as they lie in memory. tags: `tag_338=1` and the like."""
    height, width, channels = values.shape
    planes = [values[..., channel] for channel in range(channels)] if planar else [values]
    strips = [plane.astype(plane.dtype.newbyteorder(order)).tobytes() for plane in planes]
    lengths = [len(strip) for strip in strips]
    starts = [8 + sum(lengths[:index]) for index in range(len(strips))]
    rows = {
        256: [width], 257: [height], 258: [bits or 8 * values.itemsize] * channels, 259: [1], 262: [photometric],
        273: starts, 277: [channels], 278: [height], 279: lengths, 284: [2 if planar else 1],
    } | {int(name[4:]): [value] for name, value in tags.items()}  # fmt: skip
    directory = 8 + sum(lengths)
    beyond = directory + 2 + 12 * len(rows) + 4
    entries, rest = b"", b""
    for tag, numbers in sorted(rows.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(packed) > 4:
            packed, rest = struct.pack(f"{order}I", beyond + len(rest)), rest + packed
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + packed
    mark = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, directory)
    return mark + b"".join(strips) + struct.pack(f"{order}H", len(rows)) + entries + bytes(4) + rest
