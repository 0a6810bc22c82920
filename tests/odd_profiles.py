"""Colour profiles (ICC.1:2001-04) made of numbers. Standard library only."""

import struct
from collections.abc import Sequence

D50 = (0.9642, 1.0, 0.8249)
# Primaries as XYZ, adapted to D50: rows of red, green and blue.
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457))
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141))
ADOBE_GAMMA = 563 / 256


def fixed(values: Sequence[float]) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def xyz(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + fixed(values)


def gamma(exponent: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IHxx", 1, round(exponent * 256))


def profile(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78), b"wtpt": xyz(D50)} | tags
    start, table, body = 132 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(
        ">I4sI4s4s4s12s4s", start + len(body), b"", 0x02400000, b"mntr", space, connection, b"", b"acsp"
    )
    return header.ljust(68, b"\0") + fixed(D50) + bytes(48) + struct.pack(">I", len(tags)) + table + body


def rgb_profile(primaries: Sequence[Sequence[float]], exponent: float, **more: bytes) -> bytes:
    columns = {name: xyz(values) for name, values in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries)}
    curves = {name: gamma(exponent) for name in (b"rTRC", b"gTRC", b"bTRC")}
    return profile(b"RGB ", b"XYZ ", columns | curves | {name.encode(): content for name, content in more.items()})


def grey_profile(exponent: float) -> bytes:
    return profile(b"GRAY", b"XYZ ", {b"kTRC": gamma(exponent)})


def ink_profile() -> bytes:
    """Four inks that are all black: a mixture is as dark as the most of one."""
    ramp = bytes(range(256))
    corners = [(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    lab = b"".join(bytes([0 if any(corner) else 255, 128, 128]) for corner in corners)
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + fixed([1, 0, 0, 0, 1, 0, 0, 0, 1]) + ramp * 4 + lab + ramp * 3
    return profile(b"CMYK", b"Lab ", {b"A2B0": table})
