"""One reader for every way in: upright, in sRGB, eight bits a channel, whatever the file had."""

import io
import logging
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.reading import FORMATS, TooLarge, Unclear, read_file, read_image
from lib_layerdiffuse.images.rgba import from_pil
from lib_layerdiffuse.request.form import IMAGE_NEEDS
from lib_layerdiffuse.request.layers import Request
from lib_layerdiffuse.webui.api import routes
from lib_layerdiffuse.webui.host import init_picture
from tests.odd_files import RED, bomb, chunk, file_of, half, in_base64, palette_picture
from tests.odd_numbers import png_of_values, tiff_of_values
from tests.odd_profiles import ADOBE_GAMMA, ADOBE_RGB, SRGB, grey_profile, ink_profile, rgb_profile

PIXELS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 10


def by_path(file: bytes, folder: Path) -> Image.Image:
    path = folder / "picture"
    path.write_bytes(file)
    return read_file(path)


WAYS: dict[str, Callable[[bytes, Path], Image.Image]] = {
    "base64": lambda file, folder: read_image(in_base64(file)),
    "data URL": lambda file, folder: read_image(f"data:image/png;base64,{in_base64(file)}"),
    "opened": lambda file, folder: read_image(Image.open(io.BytesIO(file))),
    "a path": by_path,
}
each_way = pytest.mark.parametrize("read", WAYS.values(), ids=WAYS)


def pixels(image: Image.Image) -> np.ndarray:
    return np.array(image.convert("RGBA")).astype(int)


# --- orientation ---

# What the camera wrote (Exif 2.32, 4.6.4) -> what is to be seen; the number says which side row 0 and column 0 are.
UPRIGHT = {
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.swapaxes(0, 1),
    6: PIXELS[::-1].swapaxes(0, 1),
    7: PIXELS[::-1, ::-1].swapaxes(0, 1),
    8: PIXELS[:, ::-1].swapaxes(0, 1),
}


def tagged(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a photo"
    return exif.tobytes()


def photo(kind: str, orientation: int) -> bytes:
    options = {"tiffinfo": {0x0112: orientation}} if kind == "TIFF" else {"exif": tagged(orientation)}
    more = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    return file_of(Image.fromarray(PIXELS), kind, **options, **more.get(kind, {}))


@each_way
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize(("orientation", "expected"), UPRIGHT.items())
def test_a_photo_is_upright(orientation, expected, kind, read, tmp_path):
    image = read(photo(kind, orientation), tmp_path)
    assert image.size == expected.shape[1::-1]
    np.testing.assert_allclose(np.array(image).astype(int), expected, atol=3 if kind == "JPEG" else 0)
    again = read_image(image)  # not turned once more
    assert again.tobytes() == image.tobytes() and not again.getexif() and not again.info


@each_way
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    ("exif", "size"),
    [
        (tagged(6).replace(b"\x01\x0e", b"\x01\x00"), (2, 3)),  # the text becomes a number that is none
        (b"Exif\0\0garbage", (3, 2)),
        (b"Exif\0\0", (3, 2)),
    ],
    ids=["wrong type", "garbage", "nothing"],
)
def test_damaged_exif_makes_no_picture_unreadable(exif, size, kind, read, tmp_path):
    assert read(file_of(Image.fromarray(PIXELS), kind, exif=exif), tmp_path).size == size


# --- more than eight bits ---

SIXTEEN = np.arange(2**16).reshape(256, 256)
ROUNDED = (SIXTEEN + 128) // 257  # to the nearest; no value lies between two


def of_channels(*channels: int) -> tuple[np.ndarray, np.ndarray]:
    """All values of 16 bits in each channel, in other places, and what they are in 8. channels: where each starts."""
    values = np.stack([np.roll(SIXTEEN, start) for start in channels], axis=2).astype(np.uint16)
    return values, np.stack([np.roll(ROUNDED, start) for start in channels], axis=2)


def as_rgba(values: np.ndarray) -> np.ndarray:
    """Of one to four channels: grey or colour, perhaps with alpha."""
    color = np.broadcast_to(values[..., : len(values[0, 0]) - 1 | 1], (*values.shape[:2], 3))
    alpha = values[..., -1:] if values.shape[2] % 2 == 0 else np.full_like(color[..., :1], 255)
    return np.concatenate([color, alpha], axis=2)


@each_way
@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_png_of_sixteen_bits_is_rounded(colour, interlaced, read, tmp_path):
    values, expected = of_channels(*range(0, 4000, 1000)[: {0: 1, 2: 3, 4: 2, 6: 4}[colour]])
    image = read(png_of_values(values, colour, interlaced=interlaced), tmp_path)
    assert np.array_equal(pixels(image), as_rgba(expected))


@each_way
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    ("channels", "photometric", "more"),
    [(1, 1, {}), (3, 2, {}), (3, 2, {"planar": True}), (4, 2, {"tag_338": 2})],
    ids=["grey", "RGB", "planar", "RGBA"],
)
def test_tiff_of_sixteen_bits_is_rounded(channels, photometric, more, order, read, tmp_path):
    values, expected = of_channels(*range(channels))
    image = read(tiff_of_values(values, photometric, order=order, **more), tmp_path)
    assert np.array_equal(pixels(image), as_rgba(expected))


@pytest.mark.parametrize("compression", [1, 5, 8], ids=["none", "LZW", "deflate"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_tiff_of_other_writers_is_rounded(channels, compression):
    values, expected = of_channels(*range(channels))
    opencv_order = [0] if channels == 1 else [2, 1, 0, 3][:channels]
    _, file = cv2.imencode(".tif", values[..., opencv_order], [cv2.IMWRITE_TIFF_COMPRESSION, compression])
    assert np.array_equal(pixels(read_image(in_base64(file.tobytes()))), as_rgba(expected))


def test_premultiplied_tiff_of_sixteen_bits_has_its_colour_back():
    values, _ = of_channels(0, 0, 0, 0)
    values[..., :3] = np.array([1, 0.5, 0.25]) * values[..., 3:]
    image = pixels(read_image(in_base64(tiff_of_values(values, 2, tag_338=1))))
    seen = values[..., 3] > 2**10  # less has lost its colour in the file
    np.testing.assert_allclose(image[seen, :3], np.broadcast_to((255, 127.5, 63.75), (seen.sum(), 3)), atol=1)
    assert np.array_equal(image[..., 3], ROUNDED)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (tiff_of_values(SIXTEEN.astype(np.uint16)[..., None], 0), 255 - ROUNDED),
        (tiff_of_values((SIXTEEN / 65535).astype(np.float32)[..., None], 1, tag_339=3), ROUNDED),
        (tiff_of_values((SIXTEEN / 65535).astype(np.float32)[..., None], 0, tag_339=3), 255 - ROUNDED),
    ],
    ids=["white is zero", "float", "float, white is zero"],
)
def test_tiff_of_one_channel_is_scaled(file, expected):
    assert np.array_equal(pixels(read_image(in_base64(file)))[..., 0], expected)


def test_tiff_of_twelve_bits_is_scaled():
    pairs = np.array([[0x00, 0x0F, 0xFF], [0x80, 0x00, 0x11]], np.uint8)  # 0, 4095; 2048, 17
    file = tiff_of_values(pairs.reshape(2, 3, 1), 1, bits=12, tag_256=2)
    assert pixels(read_image(in_base64(file)))[..., 0].tolist() == [[0, 255], [128, 1]]


@pytest.mark.parametrize(
    ("image", "grey"),
    [
        (Image.new("I;16", (2, 2), 32897), 128),
        (Image.new("I", (2, 2), 32897), 128),
        (Image.new("F", (2, 2), 0.5), 128),
        (np.full((2, 2), 32897, np.uint16), 128),
        (np.full((2, 2), 0.25, np.float32), 64),
    ],
    ids=["I;16", "I", "F", "array of integers", "array of floats"],
)
def test_wide_numbers_in_memory_are_scaled(image, grey):
    assert read_image(image).convert("RGB").getcolors() == [(4, (grey,) * 3)]


def integers(low: int, high: int, kind: str) -> bytes:
    signed = {} if kind[0] == "u" else {"tag_339": 2}
    return tiff_of_values(np.array([[[low], [high]]]).astype(kind), 1, **signed)


UNCLEAR = {
    "signed": (integers(-5, 300, "i2"), "from -5 to 300 "),
    "signed, none below 0": (integers(0, 300, "i2"), "from 0 to 300 "),
    "32 bits": (integers(0, 70000, "u4"), "from 0 to 70000 "),
    "32 bits that would fit": (integers(0, 300, "u4"), "from 0 to 300 "),
    "32 bits, signed": (integers(-5, 2**31 - 1, "i4"), "from -5 to 2.14748e+09 "),
    "light beyond white": (tiff_of_values(np.full((1, 1, 1), 1.5, np.float32), 1, tag_339=3), "from 1.5 to 1.5 "),
    "no number": (tiff_of_values(np.full((1, 1, 1), np.nan, np.float32), 1, tag_339=3), "from nan to nan "),
}


@pytest.mark.parametrize(("file", "numbers"), UNCLEAR.values(), ids=UNCLEAR)
def test_numbers_of_which_none_is_known_to_be_white_are_refused_in_a_sentence(file, numbers, tmp_path):
    numbers = re.escape(numbers)
    with pytest.raises(LayerDiffuseError, match=rf"^Foreground \(fg_image in API calls\) has numbers {numbers}\(mode "):
        Request.parse([{"method": "sd15_fg2bg", "fg_image": in_base64(file)}])
    with pytest.raises(LayerDiffuseError, match=rf"^image has numbers {numbers}"):
        routes.picture("image", in_base64(file))
    with pytest.raises(LayerDiffuseError, match=rf"picture that img2img starts from has numbers {numbers}"):
        init_picture(Image.open(io.BytesIO(file)))
    with pytest.raises(LayerDiffuseError, match=rf"picture has numbers {numbers}.*8 or 16 bits a channel\.$"):
        by_path(file, tmp_path)


def test_integers_in_memory_that_are_no_sixteen_bits_are_refused():
    for value in (-1, 2**16):
        with pytest.raises(Unclear):
            read_image(Image.new("I", (2, 2), value))


# --- one transparent value ---


def shorts(*values: int) -> bytes:
    return np.array(values, ">u2").tobytes()


GREYS = np.array([[[0x1234], [0x1235], [0xFFFF]]])
COLOURS = np.array([[[1, 2, 3], [1, 2, 4], [0x101, 2, 3]]])
CLEAR = {
    "grey of 16 bits": (GREYS, 0, 16, shorts(0x1234), [0, 255, 255]),
    "colour of 16 bits": (COLOURS, 2, 16, shorts(1, 2, 3), [0, 255, 255]),
    "grey of 8 bits": (GREYS % 256, 0, 8, shorts(0x34), [0, 255, 255]),
    "grey of 8 bits, with more in the chunk": (GREYS % 256, 0, 8, shorts(0x134), [0, 255, 255]),
    "colour of 8 bits": (COLOURS % 256, 2, 8, shorts(1, 2, 3), [0, 255, 0]),
    "grey of 4 bits": (np.array([[[0x5A], [0xF0]]]), 0, 4, shorts(10), [255, 0, 255]),
    "grey of 2 bits": (np.array([[[0b01_10_11_00]]]), 0, 2, shorts(2), [255, 0, 255]),
    "grey of 1 bit": (np.array([[[0b1010_0000]]]), 0, 1, shorts(1), [0, 255, 0]),
    "a chunk where alpha is": (np.dstack([GREYS, GREYS]), 4, 16, shorts(0x1234), [18, 18, 255]),
}


@each_way
@pytest.mark.parametrize(("values", "colour", "depth", "clear", "alphas"), CLEAR.values(), ids=CLEAR)
def test_one_grey_or_colour_may_be_transparent(values, colour, depth, clear, alphas, read, tmp_path):
    file = bytearray(png_of_values(values, colour, chunk(b"tRNS", clear), depth=depth))
    if depth < 8:  # the values are packed
        file[16:33] = chunk(b"IHDR", b"\0\0\0\3" + file[20:29])[8:]
    assert pixels(read(bytes(file), tmp_path))[0, :, 3].tolist() == alphas


def test_a_transparent_grey_of_sixteen_bits_in_memory():
    image = Image.fromarray(GREYS[..., 0].astype(np.uint16))
    image.info["transparency"] = 0x1234
    assert pixels(read_image(image))[0].tolist() == [[18, 18, 18, 0], [18, 18, 18, 255], [255, 255, 255, 255]]


# --- modes ---

GREY_OF_LAB = (119, 119, 119, 255)  # L* 50
IN_MEMORY = {
    "1": (1, (255, 255, 255, 255)),
    "L": (51, (51, 51, 51, 255)),
    "LA": ((51, 102), (51, 51, 51, 102)),
    "La": ((51, 102), (128, 128, 128, 102)),
    "RGB": ((1, 2, 3), (1, 2, 3, 255)),
    "RGBX": ((1, 2, 3, 4), (1, 2, 3, 255)),
    "RGBA": ((1, 2, 3, 0), (1, 2, 3, 0)),
    "RGBa": ((51, 0, 102, 102), (128, 0, 255, 102)),
    "CMYK": ((0, 255, 255, 0), RED),
    "YCbCr": ((128, 128, 128), (128, 128, 128, 255)),
    "HSV": ((0, 255, 255), RED),
    "LAB": ((128, 128, 128), GREY_OF_LAB),
}


@pytest.mark.parametrize(("mode", "value", "expected"), [(m, *row) for m, row in IN_MEMORY.items()], ids=IN_MEMORY)
def test_an_image_of_any_mode_is_its_colour_and_alpha(mode, value, expected):
    given = Image.new(mode, (2, 2), value)
    image = read_image(given)
    assert image.mode in ("L", "RGB", "RGBA")
    np.testing.assert_allclose(pixels(image)[0, 0], expected, atol=1 if mode in ("La", "RGBa", "LAB") else 0)
    assert given.mode == mode and image is not given


def test_a_palette_with_alpha_in_memory():
    image = palette_picture().convert("PA")
    image.putalpha(Image.new("L", image.size, 77))
    assert read_image(image).getpixel((0, 0)) == (255, 0, 0, 77)


def test_an_image_handed_in_stays_as_it_was():
    """Its file can still be read, and what is known of it is still there."""
    exif = tagged(6)
    opened = Image.open(io.BytesIO(file_of(Image.fromarray(PIXELS), exif=exif)))
    place = opened.fp.tell()
    read_image(opened)
    assert opened.fp.tell() == place
    assert opened.size == (3, 2) and opened.info["exif"] == exif
    assert np.array_equal(np.array(opened), PIXELS)


def test_a_later_picture_of_a_file_is_the_one_that_was_chosen():
    file = io.BytesIO()
    Image.new("RGB", (2, 2), RED[:3]).save(file, "TIFF", save_all=True, append_images=[Image.new("RGB", (2, 2), 9)])
    opened = Image.open(file)
    opened.seek(1)
    assert read_image(opened).getpixel((0, 0)) == (9, 0, 0)


# --- colour profiles ---

COLOURED = np.array([[(128, 128, 128, 0), (200, 120, 90, 7), (70, 110, 100, 255), (250, 240, 200, 128)]], np.uint8)
XYZ_TO_SRGB = np.linalg.inv(np.array(SRGB).T)


def by_formula(rgb: np.ndarray, primaries=ADOBE_RGB, exponent: float = ADOBE_GAMMA) -> np.ndarray:
    """Colours of such a space, 0..255, as sRGB (IEC 61966-2-1)."""
    linear = (rgb / 255) ** exponent @ np.array(primaries) @ XYZ_TO_SRGB.T
    curved = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clip(1e-9) ** (1 / 2.4) - 0.055)
    return 255 * curved


ADOBE = rgb_profile(ADOBE_RGB, ADOBE_GAMMA)
LOSSLESS = {"PNG": {}, "WEBP": {"lossless": True, "exact": True}, "TIFF": {}}


@each_way
@pytest.mark.parametrize(("kind", "options"), LOSSLESS.items())
def test_a_picture_with_a_profile_becomes_srgb_and_keeps_its_alpha(kind, options, read, tmp_path):
    image = read(file_of(Image.fromarray(COLOURED), kind, icc_profile=ADOBE, **options), tmp_path)
    expected = by_formula(COLOURED[..., :3])
    assert abs(expected - COLOURED[..., :3]).max() > 20
    np.testing.assert_allclose(pixels(image)[..., :3], expected, atol=1)
    assert np.array_equal(pixels(image)[..., 3], COLOURED[..., 3])
    assert read_image(image).tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (palette_picture(), by_formula(np.array(RED[:3]))),
        (Image.new("L", (2, 2), 100), (100, 100, 100)),
        (Image.new("RGB", (2, 2), (200, 120, 90)), by_formula(np.array([200, 120, 90]))),
    ],
    ids=["palette", "grey", "JPEG"],
)
def test_a_profile_for_colours_is_for_palettes_and_greys_too(image, expected):
    kind, options = ("JPEG", {"quality": 100, "subsampling": 0}) if image.mode == "RGB" else ("PNG", {})
    read = read_image(in_base64(file_of(image, kind, icc_profile=ADOBE, **options)))
    np.testing.assert_allclose(pixels(read)[0, 0, :3], np.clip(expected, 0, 255), atol=2)


@pytest.mark.parametrize(("mode", "value"), [("L", 100), ("LA", (100, 9))])
def test_a_profile_for_grey(mode, value):
    read = read_image(in_base64(file_of(Image.new(mode, (2, 2), value), icc_profile=grey_profile(1.8))))
    grey = by_formula(np.array([100, 100, 100]), SRGB, 1.8)
    np.testing.assert_allclose(pixels(read)[0, 0, :3], grey, atol=1)
    assert pixels(read)[0, 0, 3] == (9 if mode == "LA" else 255)


@pytest.mark.parametrize(("kind", "options"), [("TIFF", {}), ("JPEG", {"quality": 100})])
def test_a_profile_for_inks(kind, options):
    """In which all of them are black, so that cyan is no longer cyan."""
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    plain, converted = (read_image(in_base64(file_of(image, kind, **options, **more)))
                        for more in ({}, {"icc_profile": ink_profile()}))  # fmt: skip
    np.testing.assert_allclose(pixels(plain)[0, 0], (0, 255, 255, 255), atol=2)
    np.testing.assert_allclose(pixels(converted)[0, 0], (0, 0, 0, 255), atol=2)


EVERY_GREY_AND_MORE = Image.merge("RGB", [Image.linear_gradient("L").rotate(angle) for angle in (0, 90, 180)])


def srgb_of_pillow() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


USELESS = {
    "junk": b"junk" * 50,
    "empty": b"",
    "cut": ADOBE[:200],
    "for grey": grey_profile(1.8),
    "for inks": ink_profile(),
    "everything black": rgb_profile(((0, 0, 0),) * 3, 2.2),
    "a huge one of zeros": bytes(2**25),
}


@pytest.mark.parametrize("profile", [srgb_of_pillow(), *USELESS.values()], ids=["sRGB", *USELESS])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_srgb_and_profiles_of_no_use_change_nothing(kind, profile):
    file = file_of(EVERY_GREY_AND_MORE, kind, icc_profile=profile)
    assert read_image(in_base64(file)).tobytes() == EVERY_GREY_AND_MORE.tobytes()


@pytest.mark.parametrize("name", [name for name, profile in USELESS.items() if profile])
def test_a_profile_that_is_not_used_is_logged(name, caplog):
    with caplog.at_level(logging.WARNING, "layerdiffuse"):
        read_image(in_base64(file_of(EVERY_GREY_AND_MORE, icc_profile=USELESS[name])))
    assert "profile of a picture was not used" in caplog.text


def test_an_srgb_profile_of_other_rounding_changes_nothing(monkeypatch):
    """As those of scanners and cameras, which LittleCMS would change by 1 here and there."""
    near = rgb_profile([[value * 1.002 for value in row] for row in SRGB], 2.2, **srgb_curves())
    file = file_of(EVERY_GREY_AND_MORE, icc_profile=near)
    assert read_image(in_base64(file)).tobytes() == EVERY_GREY_AND_MORE.tobytes()
    monkeypatch.setattr("lib_layerdiffuse.images.profiles.ROUNDING", 0)
    assert read_image(in_base64(file)).tobytes() != EVERY_GREY_AND_MORE.tobytes()


def srgb_curves() -> dict[str, bytes]:
    x = np.arange(1024) / 1023
    curve = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    table = b"curv\0\0\0\0\0\0\x04\0" + (65535 * curve).round().astype(">u2").tobytes()
    return dict.fromkeys(("rTRC", "gTRC", "bTRC"), table)


def test_a_pillow_without_littlecms_leaves_colours_as_they_are(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.ImageCms", None)
    monkeypatch.delattr("PIL.ImageCms")
    file = file_of(EVERY_GREY_AND_MORE, icc_profile=ADOBE)
    assert read_image(in_base64(file)).tobytes() == EVERY_GREY_AND_MORE.tobytes()


def test_a_profile_larger_than_pillow_allows_is_used():
    noise = np.random.default_rng(0).bytes(3 * 2**20)
    file = file_of(Image.fromarray(COLOURED), icc_profile=rgb_profile(ADOBE_RGB, ADOBE_GAMMA, priv=noise))
    np.testing.assert_allclose(pixels(read_image(in_base64(file)))[..., :3], by_formula(COLOURED[..., :3]), atol=1)


# --- PNG's chunks ---

PLAIN = png_of_values(COLOURED, 6, depth=8)


def with_chunk(name: bytes, content: bytes, broken: bool = False, file: bytes = PLAIN) -> bytes:
    """The file with a chunk before its pixels."""
    added = chunk(name, content)
    added = added[:-1] + bytes([added[-1] ^ 255]) if broken else added
    at = file.index(b"IDAT") - 4
    return file[:at] + added + file[at:]


PASSED_OVER = {
    "a text of 3 MB": with_chunk(b"zTXt", b"xmp\0\0" + zlib.compress(bytes(3 * 2**20))),
    "an international text of 3 MB": with_chunk(b"iTXt", b"xmp\0\1\0\0\0" + zlib.compress(bytes(3 * 2**20))),
    "many texts": with_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20 - 9)), file=with_chunk(
        b"tEXt", b"a\0" + bytes(2**20) * 70)),
    "a text that is broken": with_chunk(b"zTXt", b"xmp\0\0junk"),
    "a text with a wrong checksum": with_chunk(b"tEXt", b"a\0b", broken=True),
    "a size with a wrong checksum": with_chunk(b"pHYs", bytes(9), broken=True),
    "a size that is too short": with_chunk(b"pHYs", bytes(3)),
    "an animation that is none": with_chunk(b"acTL", bytes(8)),
    "a profile with a wrong checksum": with_chunk(b"iCCP", b"x\0\0" + zlib.compress(ADOBE), broken=True),
    "a profile that is damaged": with_chunk(b"iCCP", b"x\0\0junk"),
    "a profile that is nothing": with_chunk(b"iCCP", b""),
    "a bomb in place of a profile": with_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**26))),
    "exif with a wrong checksum": with_chunk(b"eXIf", tagged(6)[6:], broken=True),
    "exif that is junk": with_chunk(b"eXIf", b"junk"),
    "more behind the end": PLAIN + b"JUNK" * 20,
}  # fmt: skip


@each_way
@pytest.mark.parametrize("file", PASSED_OVER.values(), ids=PASSED_OVER)
def test_what_a_reader_may_pass_over_makes_no_picture_unreadable(file, read, tmp_path):
    if read is WAYS["opened"]:
        read = lambda file, folder: read_image(file)  # noqa: E731  # Pillow opens few of them
    assert np.array_equal(pixels(read(file, tmp_path)), COLOURED)


@pytest.mark.parametrize(
    ("content", "broken", "alpha"), [(shorts(0x1234), False, 0), (shorts(0x1234), True, 255), (b"\x12", False, 255)]
)
def test_transparency_that_is_damaged_is_passed_over(content, broken, alpha):
    file = with_chunk(b"tRNS", content, broken, png_of_values(GREYS, 0))
    assert pixels(read_image(file))[0, 0, 3] == alpha


@pytest.mark.parametrize("name", [b"IHDR", b"PLTE", b"IDAT", b"IEND"])
@pytest.mark.parametrize("depth", [8, 16])
def test_a_critical_chunk_with_a_wrong_checksum_is_refused(name, depth):
    file = with_chunk(b"PLTE", bytes(3), file=png_of_values(COLOURED, 6, depth=depth))
    at = file.index(name) + 4 + int.from_bytes(file[file.index(name) - 4 : file.index(name)], "big")
    with pytest.raises(ValueError, match="not an image"):
        read_image(file[:at] + bytes([file[at] ^ 255]) + file[at + 1 :])


def test_a_palette_keeps_its_alpha_beside_other_chunks():
    file = file_of(palette_picture(), transparency=bytes([51, 255]), icc_profile=srgb_of_pillow())
    assert read_image(file).getpixel((0, 0)) == (255, 0, 0, 51)


# --- whole files only ---


@each_way
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("rest", [b"", b"junk" * 20], ids=["cut", "junk"])
def test_a_png_of_damaged_pixels_under_a_right_checksum_is_refused(rest, depth, read, tmp_path):
    start, _, pixels_and_end = png_of_values(SIXTEEN[:32, :32, None] % 256, 0, depth=depth).partition(b"IDAT")
    file = start[:-4] + chunk(b"IDAT", pixels_and_end[:40] + rest) + chunk(b"IEND", b"")
    with pytest.raises((ValueError, LayerDiffuseError)):
        read(file, tmp_path)


CUT = {
    "PNG": file_of(Image.effect_noise((32, 32), 90)),
    "PNG of 16 bits": png_of_values(of_channels(0, 1, 2, 3)[0][:32, :32], 6),
    "TIFF of 16 bits": tiff_of_values(of_channels(0, 1, 2)[0][:32, :32], 2),
    "JPEG": file_of(Image.effect_noise((32, 32), 90), "JPEG"),
    "WebP": file_of(Image.effect_noise((32, 32), 90).convert("RGB"), "WEBP"),
}


@each_way
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("file", CUT.values(), ids=CUT)
@pytest.mark.parametrize("part", [0.1, 0.5, 0.95])
def test_a_file_that_is_cut_is_refused(part, file, read, tmp_path):
    with pytest.raises((ValueError, LayerDiffuseError, OSError)):  # Pillow's own, where it does not even open it
        read(file[: int(part * len(file))], tmp_path)


def test_too_many_pixels_are_refused_whichever_way_they_come(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(bomb(300, 300))
    with pytest.raises(TooLarge, match="more than 80,000 pixels"):
        read_image(path, 80_000)
    with pytest.raises(LayerDiffuseError, match=r"picture\.png has more than 80,000 pixels.*Choose a smaller image\.$"):
        read_file(path, 80_000)
    path.write_bytes(bomb(20_000, 20_000))
    with pytest.raises(LayerDiffuseError, match="has more than 100,000,000 pixels"):
        read_file(path)


def test_a_file_is_named_that_cannot_be_read(tmp_path):
    with pytest.raises(LayerDiffuseError, match=r"No such file: .*nothing\.png"):
        read_file(tmp_path / "nothing.png")
    with pytest.raises(LayerDiffuseError, match="cannot be read: "):
        read_file(tmp_path)
    (tmp_path / "text.png").write_text("text", encoding="utf-8")
    with pytest.raises(LayerDiffuseError, match=r"text\.png is not a whole picture\. .*" + ", ".join(FORMATS)):
        read_file(tmp_path / "text.png")


# --- other values ---


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_files_of_any_kind(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    image = read_image(in_base64(file_of(Image.new("RGB", (3, 2), (255, 0, 0)), kind, **options)))
    assert image.convert("RGB").getcolors() == [(6, (255, 0, 0))]


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_an_array_is_its_pixels(mode):
    array = np.array(half(mode, 9, 200))
    assert np.array_equal(np.array(read_image(array)), array)
    assert from_pil(read_image(array)).shape == (len(mode), 2, 4)


@pytest.mark.parametrize(
    "raw",
    [
        "no image",
        "",
        "data:image/png;base64,",
        "data:image/png",
        in_base64(b"no image"),
        in_base64(file_of(Image.fromarray(PIXELS)))[:-60],
        b"bytes",
        7,
        None,
        [[0, 0, 0]],
        {"image": "iVBOR"},
        np.zeros((2, 3, 4), np.float32),
        np.zeros((2, 3, 5), np.uint8),
        Image.new("RGB", (0, 0)),
    ],
    ids=lambda raw: type(raw).__name__,
)
def test_there_is_one_exception_for_what_is_none(raw):
    with pytest.raises(ValueError, match="not an image"):
        read_image(raw)


def test_a_path_in_a_request_is_no_way_to_a_file(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(PLAIN)
    with pytest.raises(LayerDiffuseError, match=f"Set it to {IMAGE_NEEDS}"):
        Request.parse([{"method": "sd15_fg2bg", "fg_image": str(path)}])
