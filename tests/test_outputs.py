"""Which pictures come out, with which pixels and names."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lib_layerdiffuse.images.extras import EXTRAS, OPAQUE, RGBA, make_extras
from lib_layerdiffuse.images.rgba import alpha_range, has_alpha, over, over_grey, to_pil
from lib_layerdiffuse.webui import outputs


def solid(mode: str, colour, size=(6, 4)) -> Image.Image:
    return Image.new(mode, size, colour)


def random_image(mode: str, seed: int, size=(6, 4)) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], len(mode)), np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def expected():
    return random_image("RGB", 0)


@pytest.fixture
def decoded():
    return random_image("RGBA", 1)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_untouched_picture_is_the_decoder_s(decoded, expected, mode):
    rgba = outputs.transparent(decoded, expected, expected.convert(mode))
    assert rgba.mode == "RGBA"
    assert rgba.tobytes() == decoded.tobytes()


def seen(rgba):
    """Over the middle grey, in 8 bits: [H, W, 3]."""
    pixels = np.asarray(rgba) / 255
    return 255 * (pixels[..., :3] * pixels[..., 3:] + 0.5 * (1 - pixels[..., 3:]))


def test_edited_pixels_look_over_grey_as_they_were_shown(decoded, expected):
    """Where some colour can do that; the others stay bit for bit, and so does alpha."""
    rgba = outputs.transparent(decoded, expected, shown := to_pil(over_grey(decoded)[0] * 0.9 + 0.05))
    difference = np.abs(seen(rgba) - np.asarray(shown))
    alpha = np.asarray(decoded)[..., 3:] / 255
    assert (difference <= np.where(alpha == 0, 255, 0.5 + 0.5 * alpha)).all()
    assert rgba.getchannel("A").tobytes() == decoded.getchannel("A").tobytes()


def test_what_nobody_edited_stays_as_it_was_decoded(decoded, expected):
    shown = expected.copy()
    shown.putpixel((2, 3), (9, 8, 7))
    pixels = np.array(outputs.transparent(decoded, expected, shown))
    pixels[3, 2] = np.asarray(decoded)[3, 2]
    np.testing.assert_array_equal(pixels, np.asarray(decoded))


@pytest.mark.parametrize(
    ("alpha", "colour"), [(255, (10, 20, 200)), (128, (0, 0, 255)), (204, (0, 0, 218)), (0, (0, 0, 0))]
)
def test_off_grey(alpha, colour):
    """(10, 20, 200) over the middle grey, or what comes nearest to it with that alpha."""
    assert outputs.off_grey(solid("RGBA", (10, 20, 200, alpha))).getpixel((0, 0)) == (*colour, alpha)


def test_enlarged_picture_looks_over_grey_as_it_was_shown(decoded, expected):
    shown = solid("RGB", (120, 130, 128), (12, 8))
    rgba = outputs.transparent(decoded, expected, shown)
    assert (rgba.mode, rgba.size) == ("RGBA", (12, 8))
    assert np.abs(seen(rgba) - np.asarray(shown))[np.asarray(rgba)[..., 3] > 16].max() <= 1
    assert len(set(rgba.getchannel("A").tobytes())) > 4


def test_pixels_are_cut_off_to_8_bits_as_the_host_does_it():
    pixels = torch.tensor([0, 0.999 / 255, 1.001 / 255, 254.999 / 255, 1]).expand(3, 1, 5)
    assert outputs.host_pixels(pixels)[0, :, 0].tolist() == [0, 0, 1, 254, 255]


def test_placed_is_the_picture_in_its_region_and_nothing_around(decoded):
    whole = np.array(outputs.placed(decoded, (3, 2, 9, 6), 12, 7))
    expected = np.zeros((7, 12, 4), np.uint8)
    expected[2:6, 3:9] = np.array(decoded)
    np.testing.assert_array_equal(whole, expected)


def test_placed_makes_the_picture_small_without_its_hidden_colours():
    picture = solid("RGBA", (0, 255, 0, 0), (64, 64))
    picture.paste((255, 0, 0, 255), (0, 0, 30, 64))
    small = np.array(outputs.placed(picture, (4, 4, 20, 20), 24, 24))
    assert (small[4:20, 4:8] == (255, 0, 0, 255)).all()
    assert (small[small[..., 3] > 0, :3] == (255, 0, 0)).all()
    small[4:20, 4:20] = 0
    assert not small.any()


def test_placed_takes_the_middle_where_the_region_has_another_shape():
    picture = solid("RGBA", (200, 0, 0, 255), (16, 32))
    picture.paste((0, 0, 255, 77), (0, 8, 16, 24))
    whole = outputs.placed(picture, (1, 1, 17, 17), 18, 18)
    assert whole.crop((1, 1, 17, 17)).getcolors() == [(256, (0, 0, 255, 77))]


SOURCES = {
    RGBA: solid("RGBA", (200, 0, 0, 128)),
    OPAQUE: solid("RGB", (1, 2, 3)),
    "fg": solid("RGBA", (0, 90, 0, 77)),
    "bg": solid("RGB", (250, 11, 4)),
    "blend": solid("RGB", (5, 5, 5)),
}


@pytest.mark.parametrize(
    ("there", "made"),
    [
        ([], []),
        (["rgba"], ["mask", "preview"]),
        (["opaque"], ["opaque"]),
        (["rgba", "opaque"], ["opaque", "mask", "preview"]),
        (["fg"], []),
        (["bg", "blend"], []),
        (["fg", "blend"], []),
        (["fg", "bg"], ["composed"]),
        (["fg", "bg", "blend"], ["composed"]),
        (["blend", "bg", "fg", "opaque", "rgba"], ["opaque", "mask", "preview", "composed"]),
    ],
    ids=" ".join,
)
def test_extras_are_made_of_what_is_there_in_the_order_of_the_table(there, made):
    wanted = list(reversed(EXTRAS))
    assert list(make_extras({name: SOURCES[name] for name in there}, wanted)) == made


def test_only_what_is_wanted_is_made():
    for name in EXTRAS:
        assert list(make_extras(SOURCES, ["no such extra", name])) == [name]
    assert make_extras(SOURCES, []) == {}


def test_extras_show_what_they_say():
    extras = make_extras(SOURCES, EXTRAS)
    assert extras["opaque"] is SOURCES[OPAQUE]
    assert extras["mask"].mode == "L"
    assert extras["mask"].getpixel((0, 0)) == 128
    red, green, _ = extras["preview"].getpixel((0, 0))
    assert 150 < red < 170
    assert 50 < green < 75  # half of a grey near the middle
    assert extras["composed"] == over(SOURCES["fg"], SOURCES["bg"])
    assert extras["composed"].getpixel((0, 0)) == (175, 35, 3)  # 77 of 255 parts of the one, the rest of the other


@pytest.mark.parametrize("name", EXTRAS)
def test_jpg_may_hold_only_opaque_pictures(name):
    if EXTRAS[name].lossy:
        assert make_extras(SOURCES, [name])[name].mode == "RGB"
    assert EXTRAS["mask"].lossy is False  # an alpha is data, not a picture


def with_alphas(*alphas) -> Image.Image:
    image = solid("RGBA", (1, 2, 3), (len(alphas), 1))
    image.putalpha(Image.frombytes("L", image.size, bytes(alphas)))
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (solid("RGB", (1, 2, 3)), (255, 255)),
        (solid("RGBA", (1, 2, 3, 255)), (255, 255)),
        (solid("RGBA", (1, 2, 3, 254)), (254, 254)),
        (with_alphas(255, 3, 200), (3, 255)),
        (solid("L", 3), (255, 255)),
        (solid("LA", (3, 0)), (0, 0)),
        (solid("P", 0), (255, 255)),
    ],
)
def test_alpha_range(image, expected):
    assert alpha_range(image) == expected
    assert has_alpha(image) is (expected != (255, 255))


@pytest.mark.parametrize(("mode", "entry"), [("P", 0), ("L", 0), ("RGB", (0, 0, 0))])
def test_a_transparent_colour_beside_the_pixels_is_alpha(mode, entry):
    image = solid(mode, entry)
    image.info["transparency"] = entry
    assert alpha_range(image) == (0, 0)
    assert has_alpha(image)


@pytest.mark.parametrize(
    ("path", "ending", "expected"),
    [
        ("out/00001-1.png", "-fg", "out/00001-1-fg.png"),
        ("out/00001-1.png", "", "out/00001-1.png"),
        ("out/00001-cfg 7.5.avif", "-blend", "out/00001-cfg 7.5-blend.avif"),
        ("00001", "-bg", "00001-bg"),
    ],
)
def test_named(path, ending, expected):
    assert outputs.named(Path(path), ending, lambda path: True) == Path(expected)


ENDINGS = ["", "-fg", "-bg", "-blend"]
NAMES_OF_EXTRAS = [f"-{name}" for name in EXTRAS]


@pytest.mark.parametrize("length", range(20, 70))
def test_names_that_are_too_long_are_cut_before_their_endings(length):
    """All names of pictures that belong together differ, and are taken by the host as they are."""
    host_takes = 60

    def fits(path):
        return len(str(path.with_suffix(""))) <= host_takes

    stem = ("00012-1-" + "a glass bottle " * 9)[:length]
    made = [outputs.named(Path(f"out/{stem}.png"), ending, fits) for ending in ENDINGS]
    derived = [path.with_stem(path.stem + name) for path in made for name in NAMES_OF_EXTRAS]
    assert len({*made, *derived}) == len(ENDINGS) * (1 + len(NAMES_OF_EXTRAS))
    assert all(map(fits, (*made, *derived)))
    assert all(path.stem.endswith(ending) and path.stem.startswith("00012-1-") for path, ending in zip(made, ENDINGS))
    room = host_takes - len("out/") - len("-composed")
    assert [len(path.stem) for path in made] == [min(length + len(ending), room) for ending in ENDINGS]


def test_a_name_that_was_cut_is_none_of_a_file_that_is_there(tmp_path):
    """The host looked for the name that it had made, before it was cut."""
    fits = lambda path: len(path.stem) <= 30  # noqa: E731
    names = []
    for _ in range(11):
        path = outputs.named(tmp_path / f"a glass bottle with a cap-{len(names)}.png", "-fg", fits)
        assert not path.exists()
        path.touch()
        names.append(path.stem)
    assert names[:2] + names[-1:] == ["a glass bottle wit-fg", "a glass bottle w-1-fg", "a glass bottle -10-fg"]


def test_a_name_that_was_not_cut_is_the_hosts(tmp_path):
    path = tmp_path / "00001.png"
    path.touch()
    assert outputs.named(path, "", lambda path: True) == path


@pytest.mark.parametrize(
    ("infotext", "expected"),
    [
        ("apple\nSteps: 1, Seed: 1", ""),
        ("apple\nSteps: 1, LayerDiffuse shows: foreground, Version: 1", "-fg"),
        ("apple\nSteps: 1, LayerDiffuse shows: blend, Version: 1, LayerDiffuse extra: opaque", "-blend-opaque"),
        ("apple\nSteps: 1, LayerDiffuse extra: mask", "-mask"),
        (outputs.text_of_extra("Steps: 1, LayerDiffuse shows: background", "preview"), "-bg-preview"),
    ],
)
def test_a_picture_from_a_file_is_named_by_its_infotext(infotext, expected):
    assert outputs.ending(infotext) == expected


def test_a_picture_alone_has_no_name():
    assert outputs.Picture(solid("RGB", 0), {}).name == ""


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
    assert outputs.lossless_name(Path(name)) == Path(expected)


def test_mark_stays_with_the_object():
    image = solid("RGBA", (0, 0, 0, 0))
    picture = outputs.Picture(solid("RGB", 0), {})
    assert outputs.mark(image, picture, "foreground") is image
    assert outputs.is_marked(image)
    assert outputs.picture_of(image) is picture
    assert outputs.caption_of(image) == "foreground"
    for other in (image.copy(), solid("RGB", 0)):
        assert not outputs.is_marked(other)
        assert outputs.picture_of(other) is None
        assert outputs.caption_of(other) == ""


def test_a_mark_may_say_no_more_than_that_it_is_ours():
    image = outputs.mark(solid("RGB", 0))
    assert outputs.is_marked(image)
    assert outputs.picture_of(image) is None
    assert outputs.caption_of(image) == ""


@pytest.mark.parametrize("shown", ["out/00001-1.png", None, ("out/00001-1.png", "a caption")])
def test_what_else_a_gallery_may_hold_has_no_caption(shown):
    assert outputs.caption_of(shown) == ""


def test_an_overlay_of_two_parts_becomes_one_picture():
    original, seen = Image.new("RGB", (2, 1), (9, 8, 7)), np.array([[0.0, 0.6]], dtype=np.float32)
    overlay = outputs.one_overlay((original, seen))
    assert np.asarray(overlay).tolist() == [[[9, 8, 7, 255], [9, 8, 7, 102]]]
    assert outputs.one_overlay(overlay) is overlay
    assert outputs.one_overlay(None) is None
