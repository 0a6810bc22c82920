"""Picture files as people send them too: of rare formats, broken, or none at all. Standard library and Pillow only."""

import base64
import io
import struct
import zipfile
import zlib

from PIL import Image

RED, BLUE, CLEAR = (255, 0, 0, 255), (0, 0, 255, 255), (0, 0, 0, 0)


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def sent(image: Image.Image, kind: str = "PNG", **options: object) -> str:
    return in_base64(file_of(image, kind, **options))


def half(mode: str, left: object, right: object) -> Image.Image:
    """4 by 2 pixels: the left half of one colour, the right half of another."""
    image = Image.new(mode, (4, 2), left)
    image.paste(right, (2, 0, 4, 2))
    return image


def palette_picture() -> Image.Image:
    image = half("P", 0, 1)
    image.putpalette([*RED[:3], *BLUE[:3]])
    return image


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of(rows: bytes, width: int, height: int, depth: int, colour: int) -> bytes:
    """A PNG file from unfiltered rows: each a zero byte, then the values."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bomb(width: int, height: int) -> bytes:
    """The largest part of a black picture that is a small file."""
    return png_of(bytes(1 + width // 8) * min(height, 1000), width, height, depth=1, colour=0)


def sixteen_bits(colour: int, *channels: int) -> bytes:
    """Two pixels beside each other: these values, then zeros."""
    return png_of(b"\0" + struct.pack(f">{2 * len(channels)}H", *channels, *[0] * len(channels)), 2, 1, 16, colour)


# What is sent -> the colour and alpha of its leftmost and its rightmost pixel.
RARE = {
    "palette": (sent(palette_picture()), RED, BLUE),
    "palette, one entry transparent": (sent(palette_picture(), transparency=1), RED, (0, 0, 255, 0)),
    "palette with alpha": (sent(palette_picture(), transparency=bytes([51, 255])), (255, 0, 0, 51), BLUE),
    "1 bit": (sent(half("1", 1, 0)), (255, 255, 255, 255), (0, 0, 0, 255)),
    "grey": (sent(half("L", 51, 204)), (51, 51, 51, 255), (204, 204, 204, 255)),
    "grey with alpha": (sent(half("LA", (51, 255), (204, 102))), (51, 51, 51, 255), (204, 204, 204, 102)),
    "grey, one value transparent": (sent(half("L", 51, 204), transparency=51), (51, 51, 51, 0), (204, 204, 204, 255)),
    "16-bit grey": (in_base64(sixteen_bits(0, 51 * 257)), (51, 51, 51, 255), (0, 0, 0, 255)),
    "16-bit grey with alpha": (in_base64(sixteen_bits(4, 51 * 257, 102 * 257)), (51, 51, 51, 102), CLEAR),
    "16-bit RGB": (in_base64(sixteen_bits(2, 65535, 0, 51 * 257)), (255, 0, 51, 255), (0, 0, 0, 255)),
    "16-bit RGBA": (in_base64(sixteen_bits(6, 65535, 0, 51 * 257, 102 * 257)), (255, 0, 51, 102), CLEAR),
    "CMYK": (sent(half("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "TIFF"), RED, BLUE),
    "animated GIF": (sent(half("RGB", RED[:3], BLUE[:3]), "GIF", save_all=True, append_images=[half("RGB", 0, 0)]),
                     RED, BLUE),
    "animated PNG": (sent(half("RGBA", RED, CLEAR), save_all=True, append_images=[Image.new("RGBA", (4, 2), BLUE)]),
                     RED, CLEAR),
    "animated WebP": (sent(half("RGBA", RED, BLUE), "WEBP", lossless=True, save_all=True,
                           append_images=[Image.new("RGBA", (4, 2))]), RED, BLUE),
}  # fmt: skip


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("picture.png", file_of(palette_picture()))
    return file.getvalue()


WHOLE = file_of(Image.effect_noise((64, 64), 90))
NO_PICTURES: dict[str, object] = {
    "cut in the middle": in_base64(WHOLE[: len(WHOLE) // 2]),
    "cut in the header": in_base64(WHOLE[:20]),
    "a wrong checksum": in_base64(WHOLE[:60] + bytes([WHOLE[60] ^ 255]) + WHOLE[61:]),
    "no pixels": in_base64(png_of(b"", 0, 0, 8, 2)),
    "SVG": in_base64(b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"><rect width="64"/></svg>'),
    "HTML": in_base64(b"<!DOCTYPE html><html><img src=x></html>"),
    "PDF": in_base64(file_of(palette_picture().convert("RGB"), "PDF")),
    "EPS, which would start a program": in_base64(file_of(palette_picture().convert("RGB"), "EPS")),
    "zip": in_base64(zipped()),
    "an empty data URL": "data:image/png;base64,",
    "a path": "../../../../etc/passwd",
    "a path that could be base64": "etc/passwd/x",
    "a path on Windows": "C:\\Windows\\win.ini",
    "a file's address": "file:///etc/passwd",
    "an address": "http://127.0.0.1:9/picture.png",
    "an address as data URL": "data:http://127.0.0.1:9/picture.png",
    "a data URL in percents": "data:image/svg+xml,%3Csvg%20/%3E",
    "half a character": "\ud800",
    "a megabyte of nothing": "A" * 2**20,
    "a megabyte of spaces": "A " * 2**19,
    "a list": [sent(palette_picture())],
    "a dict": {"image": sent(palette_picture())},
    "lists in lists": [[[[[]]]]],
    "a dict of them": {"deep": [[[[[]]]]]},
    "true": True,
    "not a number": float("nan"),
}
