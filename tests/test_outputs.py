"""Which pictures come out, with which pixels and names."""

import numpy as np
import pytest
import torch
from PIL import Image

from lib_layerdiffuse import outputs


def solid(mode: str, colour, size=(6, 4)) -> Image.Image:
    return Image.new(mode, size, colour)


@pytest.fixture
def painted():
    return torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def decoded():
    return torch.rand(4, 4, 6, generator=torch.Generator().manual_seed(1))


def test_untouched_picture_is_the_decoder_s(painted, decoded):
    rgba = outputs.transparent(decoded, painted, Image.fromarray(outputs.host_pixels(painted)))
    expected = (decoded.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    assert rgba.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(rgba), expected)


def test_edited_pixels_keep_their_edit_and_the_decoder_s_alpha(painted, decoded):
    shown = Image.fromarray(outputs.host_pixels(painted))
    shown.putpixel((2, 3), (9, 8, 7))
    rgba = np.asarray(outputs.transparent(decoded, painted, shown))
    expected = (decoded.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    expected[3, 2, :3] = 9, 8, 7
    np.testing.assert_array_equal(rgba, expected)


def test_enlarged_picture_keeps_its_colour_and_gets_alpha_of_its_size(painted, decoded):
    shown = solid("RGB", (10, 20, 30), (12, 8))
    rgba = outputs.transparent(decoded, painted, shown)
    assert (rgba.mode, rgba.size) == ("RGBA", (12, 8))
    assert rgba.convert("RGB").tobytes() == shown.tobytes()
    assert len(set(rgba.getchannel("A").tobytes())) > 4


def test_extras_come_in_the_order_of_the_table():
    rgba, opaque = solid("RGBA", (200, 0, 0, 128)), solid("RGB", (1, 2, 3))
    picture = outputs.make_picture(rgba, opaque, ["preview", "mask", "opaque"])
    assert list(picture.extras) == ["opaque", "mask", "preview"]
    assert picture.extras["opaque"].getpixel((0, 0)) == (1, 2, 3)
    assert picture.extras["mask"].getpixel((0, 0)) == 128
    red, green, _ = picture.extras["preview"].getpixel((0, 0))
    assert 150 < red < 170
    assert 50 < green < 75  # half of a grey near the middle
    assert list(outputs.make_picture(rgba, opaque, []).extras) == []


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (solid("RGB", (1, 2, 3)), False),
        (solid("RGBA", (1, 2, 3, 255)), False),
        (solid("RGBA", (1, 2, 3, 254)), True),
        (solid("L", 3), False),
        (solid("LA", (3, 0)), True),
        (solid("P", 0), False),
    ],
)
def test_has_alpha(image, expected):
    assert outputs.has_alpha(image) is expected


def test_palette_with_a_transparent_entry_has_alpha():
    image = solid("P", 0)
    image.info["transparency"] = 0
    assert outputs.has_alpha(image)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("out/00001-1.jpg", "out/00001-1.png"),
        ("out/00001-1.webp", "out/00001-1.png"),
        ("out/00001-cfg 7.5.avif", "out/00001-cfg 7.5.png"),
        ("out/00001-1.png", "out/00001-1.png"),
        ("out/00001-1.PNG", "out/00001-1.PNG"),
    ],
)
def test_lossless_name(name, expected):
    assert outputs.lossless_name(name) == expected


def test_mark_stays_with_the_object():
    image = solid("RGBA", (0, 0, 0, 0))
    picture = outputs.make_picture(image, solid("RGB", 0), [])
    outputs.mark(image, picture)
    assert outputs.picture_of(image) is picture
    assert not outputs.is_marked(image.copy())
