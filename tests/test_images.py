"""Picture maths: against OpenCV where it has the same operation, else by what must hold for every picture."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from lib_layerdiffuse.images.rgba import (
    ResizeMode,
    as_mask,
    blended,
    checkerboard,
    compose,
    content_hash,
    fill_masked,
    fit,
    flattened,
    from_pil,
    over,
    over_grey,
    pad_colors,
    shrink,
    spread,
    to_pil,
)
from tests.reference import cv2_pad_colors

sides = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)


def random_rgba(height, width, seed=0, batch=1):
    """Random colours under a random alpha of which a good part is fully transparent or fully opaque."""
    generator = torch.Generator().manual_seed(seed)
    rgba = torch.rand(batch, 4, height, width, generator=generator)
    rgba[:, 3] = (rgba[:, 3] * 3 - 1).clamp(0, 1)
    return rgba


@pytest.mark.parametrize(("height", "width"), [(64, 64), (97, 50), (3, 200), (1, 1), (128, 72)])
def test_pad_colors_agrees_with_opencv(height, width):
    rgba = random_rgba(height, width)
    rgba[:, 3, : height // 2] = 0
    expected = cv2_pad_colors(rgba[0].permute(1, 2, 0).numpy())
    torch.testing.assert_close(pad_colors(rgba)[0].permute(1, 2, 0), torch.from_numpy(expected), rtol=0, atol=2e-3)


@settings(max_examples=50, deadline=None)
@given(sides, sides, seeds)
def test_pad_colors_keeps_what_is_opaque_and_ignores_what_is_hidden(height, width, seed):
    rgba = random_rgba(height, width, seed)
    padded = pad_colors(rgba)
    assert padded.shape == (1, 3, height, width)
    assert 0 <= padded.min() <= padded.max() <= 1

    opaque = (rgba[:, 3:] == 1).expand_as(padded)
    assert torch.equal(padded[opaque], rgba[:, :3][opaque])

    other_hidden = torch.cat([torch.where(rgba[:, 3:] == 0, 1 - rgba[:, :3], rgba[:, :3]), rgba[:, 3:]], dim=1)
    assert torch.equal(pad_colors(other_hidden), padded)


@settings(max_examples=25, deadline=None)
@given(sides, sides, seeds)
def test_pad_colors_of_one_color_is_that_color(height, width, seed):
    rgba = random_rgba(height, width, seed)
    rgba[:, :3] = torch.tensor([0.2, 0.6, 1.0]).view(3, 1, 1)
    rgba[:, 3, 0, 0] = 1
    torch.testing.assert_close(pad_colors(rgba), rgba[:, :3], rtol=0, atol=1e-5)


def test_pad_colors_takes_each_picture_of_a_batch_by_itself():
    rgba = random_rgba(30, 20, batch=3)
    alone = [pad_colors(rgba[index : index + 1]) for index in range(3)]
    torch.testing.assert_close(pad_colors(rgba), torch.cat(alone))


def test_pad_colors_of_nothing_is_black():
    assert not pad_colors(torch.cat([torch.rand(1, 3, 9, 9), torch.zeros(1, 1, 9, 9)], dim=1)).any()


@settings(max_examples=50, deadline=None)
@given(sides, sides, st.integers(1, 5), seeds)
def test_spread_keeps_what_is_known_and_stays_within_its_range(height, width, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(1, channels, height, width, generator=generator) * 4 - 2
    known = (torch.rand(1, 1, height, width, generator=generator) < 0.3).float()
    known[..., 0, 0] = 1
    everywhere = spread(values * known, known)
    seen = known.expand_as(values) == 1
    assert torch.equal(everywhere[seen], values[seen])
    for index in range(channels):
        channel, of_known = everywhere[:, index], values[:, index][known[:, 0] == 1]
        assert of_known.min() - 1e-4 <= channel.min() <= channel.max() <= of_known.max() + 1e-4


def test_spread_takes_more_of_what_is_near():
    known = torch.ones(1, 1, 20, 60)
    known[..., 10:50] = 0
    values = torch.full((1, 1, 20, 60), 0.2)
    values[..., 30:] = 0.8
    middle = spread(values * known, known)[0, 0, 10]
    assert middle[10] < 0.35 and middle[49] > 0.65
    assert middle[15] < middle[30] < middle[44]


def test_spread_of_nothing_is_nothing():
    assert not spread(torch.zeros(1, 4, 9, 9), torch.zeros(1, 1, 9, 9)).any()


def box_mask(height, width, top, left, bottom, right):
    mask = torch.zeros(1, 1, height, width)
    mask[..., top:bottom, left:right] = 1
    return mask


@settings(max_examples=50, deadline=None)
@given(sides, sides, *[st.floats(0, 1)] * 4, seeds)
def test_fill_masked_keeps_the_rest_and_sees_neither_what_is_masked_nor_hidden_colours(
    height, width, top, left, bottom, right, seed
):
    rgba = random_rgba(height, width, seed)
    edges = (int(top * height), int(left * width), int(bottom * height) + 1, int(right * width) + 1)
    mask = box_mask(height, width, *edges)
    filled = fill_masked(rgba, mask)
    assert filled.shape == rgba.shape
    assert 0 <= filled.min() <= filled.max() <= 1

    kept = mask == 0
    assert torch.equal(filled[:, 3:][kept], rgba[:, 3:][kept])
    visible = (kept & (rgba[:, 3:] > 0)).expand(-1, 3, -1, -1)
    torch.testing.assert_close(filled[:, :3][visible], rgba[:, :3][visible], rtol=0, atol=1e-5)

    other = torch.where(mask == 1, 1 - rgba, rgba)
    other[:, :3] = torch.where(rgba[:, 3:] == 0, 1 - other[:, :3], other[:, :3])
    assert torch.equal(fill_masked(other, mask), filled)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 0.02])
def test_fill_masked_gives_the_colour_and_alpha_around(alpha):
    around = torch.tensor([0.8, 0.1, 0.3, alpha])[None, :, None, None].expand(1, 4, 40, 50)
    mask = box_mask(40, 50, 12, 9, 30, 28)
    picture = torch.where(mask == 1, torch.tensor([0.0, 1.0, 0.0, 1.0])[None, :, None, None], around)
    torch.testing.assert_close(fill_masked(picture, mask), around, rtol=0, atol=1e-4)


def test_fill_masked_goes_from_the_subject_to_nothing_without_a_hidden_colour():
    """Opaque red to the left of the mask, transparent green to the right."""
    picture = torch.zeros(1, 4, 30, 60)
    picture[:, 1] = 1
    picture[..., :20] = torch.tensor([1.0, 0, 0, 1])[None, :, None, None]
    filled = fill_masked(picture, box_mask(30, 60, 0, 20, 30, 40))
    color, alpha = filled.split([3, 1], dim=1)
    seen = (alpha > 1e-3).expand_as(color)
    red = torch.tensor([1.0, 0, 0])[None, :, None, None].expand_as(color)
    torch.testing.assert_close(color[seen], red[seen], rtol=0, atol=1e-3)
    across = alpha[0, 0, 15, 20:40]
    assert across[0] > 0.75 > 0.25 > across[-1] > 0
    assert (across.diff() <= 1e-4).all()


def test_fill_masked_by_a_soft_mask_is_the_picture_to_the_degree_that_it_is_known():
    around = torch.tensor([0.8, 0.1, 0.3, 0.5])[None, :, None, None].expand(1, 4, 24, 24)
    soft = torch.linspace(0, 1, 24).expand(1, 1, 24, 24)
    torch.testing.assert_close(fill_masked(around, soft), around, rtol=0, atol=1e-4)


def test_fill_masked_of_all_is_nothing():
    assert not fill_masked(random_rgba(9, 9), torch.ones(1, 1, 9, 9)).any()


@settings(max_examples=50, deadline=None)
@given(sides, sides, st.floats(0.5, 1), st.floats(0.5, 1), seeds)
def test_shrink_keeps_the_mean_and_agrees_with_opencv(height, width, vertical, horizontal, seed):
    picture = random_rgba(height, width, seed)
    size = max(1, int(height * vertical)), max(1, int(width * horizontal))
    small = shrink(picture, *size)
    torch.testing.assert_close(small.mean((2, 3)), picture.mean((2, 3)))
    expected = cv2.resize(picture[0].permute(1, 2, 0).numpy(), size[::-1], interpolation=cv2.INTER_AREA)
    expected = torch.from_numpy(expected).reshape(*size, 4)
    torch.testing.assert_close(small[0].permute(1, 2, 0), expected, rtol=0, atol=2e-3)


def test_checkerboard_alternates_two_greys_in_both_directions():
    board = checkerboard(40, 50)
    assert board.shape == (1, 3, 40, 50)
    dark, light = board[0, 0, 0, 0], board[0, 0, 0, 16]
    assert 0.4 < dark < 0.5 < light < 0.6
    assert (board[0, :, 16, 16] == dark).all()
    assert (board[0, :, 16, 0] == light).all()
    assert (board[0, :, :16, :16] == dark).all()


def test_compose():
    rgba = random_rgba(5, 6, batch=2)
    background = torch.rand(1, 3, 5, 6)
    expected = torch.lerp(background.expand(2, -1, -1, -1), rgba[:, :3], rgba[:, 3:])
    torch.testing.assert_close(compose(rgba, background), expected)
    assert torch.equal(compose(torch.zeros(1, 4, 5, 6), background), background)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_pil_there_and_back_is_exact(mode):
    values = np.arange(256 * len(mode), dtype=np.uint8).reshape(16, 16, len(mode))
    image = Image.fromarray(values)
    picture = from_pil(image)
    assert picture.shape == (len(mode), 16, 16)
    assert picture.min() == 0
    assert picture.max() == 1
    again = to_pil(picture)
    assert again.mode == mode
    assert np.array_equal(np.array(again), values)


def test_to_pil_rounds_to_the_nearest_value_and_clips():
    picture = torch.tensor([-1, 0.49 / 255, 0.51 / 255, 253.51 / 255, 254.49 / 255, 7]).expand(3, 1, 6)
    assert np.array(to_pil(picture))[0, :, 0].tolist() == [0, 0, 1, 254, 254, 255]


TRANSPARENT_MODES = {"L": 3, "1": 3, "P": 3, "CMYK": 3, "LA": 4, "PA": 4, "RGBa": 4}


@pytest.mark.parametrize(("mode", "channels"), TRANSPARENT_MODES.items())
def test_from_pil_has_alpha_where_the_image_can_be_transparent(mode, channels):
    assert from_pil(Image.new(mode, (5, 3))).shape == (channels, 3, 5)


def test_from_pil_knows_a_transparent_palette_color():
    image = Image.new("P", (5, 3))
    image.info["transparency"] = 0
    assert not from_pil(image)[3].any()


def test_over_grey_shows_half_of_full_where_nothing_is():
    image = Image.new("RGBA", (3, 2), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.putpixel((2, 0), (255, 0, 0, 51))
    flat = over_grey(image)
    assert flat.shape == (1, 3, 2, 3)
    expected = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.6, 0.4, 0.4]])
    torch.testing.assert_close(flat[0, :, 0].T, expected)


@pytest.mark.parametrize(("mode", "colour"), [("RGB", (51, 102, 204)), ("L", 51), ("RGBA", (51, 102, 204, 255))])
def test_over_grey_of_what_is_opaque_is_the_image(mode, colour):
    image = Image.new(mode, (3, 2), colour)
    assert torch.equal(over_grey(image)[0], from_pil(image.convert("RGB")))


def test_flattened_is_over_grey_as_an_image():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    flat = flattened(image)
    assert flat.mode == "RGB"
    assert [flat.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (128, 128, 128)]
    assert [flattened(Image.new(mode, (2, 1), 9)).mode for mode in ("RGB", "L")] == ["RGB", "RGB"]


@pytest.mark.parametrize(("mode", "entry"), [("RGB", (9, 8, 7)), ("L", 9), ("P", 1)])
def test_flattened_knows_a_transparent_colour(mode, entry):
    image = Image.new(mode, (1, 1), entry)
    image.info["transparency"] = entry
    assert flattened(image).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_over_is_the_exact_formula_rounded_once(mode):
    """For every alpha, and colours from all over the range."""
    generator = np.random.default_rng(0)
    foreground = generator.integers(0, 256, (64, 256, 4), np.uint8)
    foreground[..., 3] = np.arange(256)
    background = generator.integers(0, 256, (64, 256, 3), np.uint8)
    composed = over(Image.fromarray(foreground), Image.fromarray(background).convert(mode))
    color, alpha, behind = foreground[..., :3].astype(int), foreground[..., 3:].astype(int), background.astype(int)
    assert composed.mode == "RGB"
    assert np.array_equal(np.array(composed), (color * alpha + behind * (255 - alpha) + 127) // 255)


@pytest.mark.parametrize(
    ("foreground", "background", "expected"),
    [
        ((200, 0, 0, 0), (0, 90, 0, 0), (0, 0, 0, 0)),
        ((200, 10, 0, 255), (0, 90, 0, 0), (200, 10, 0, 255)),
        ((200, 10, 0, 0), (0, 90, 7, 77), (0, 90, 7, 77)),
        ((200, 0, 0, 128), (0, 0, 100, 128), (134, 0, 33, 192)),  # of an alpha of 192, 128 parts and 64
    ],
)
def test_over_a_transparent_background(foreground, background, expected):
    composed = over(*(Image.new("RGBA", (1, 1), colour) for colour in (foreground, background)))
    assert (composed.mode, composed.getpixel((0, 0))) == ("RGBA", expected)


def test_an_opaque_foreground_covers_what_it_is_over():
    foreground = Image.new("RGB", (3, 2), (1, 2, 3))
    assert over(foreground, Image.new("RGB", (3, 2), (200, 200, 200))) == foreground


def with_every_weight() -> tuple[np.ndarray, np.ndarray, Image.Image]:
    """Two pictures of any values, hidden ones too, and a mask of which each row is of another value."""
    generator = np.random.default_rng(0)
    before, after = generator.integers(0, 256, (2, 256, 64, 4), np.uint8)
    before[:, :16, 3] = 0
    after[:, 8:24, 3] = 0
    return before, after, Image.fromarray(np.arange(256, dtype=np.uint8)[:, None].repeat(64, axis=1))


def test_blended_is_one_or_the_other_picture_where_the_mask_says_so():
    before, after, mask = with_every_weight()
    mixed = np.array(blended(Image.fromarray(before), Image.fromarray(after), mask))
    assert np.array_equal(mixed[0], before[0])
    assert np.array_equal(mixed[255], after[255])


def test_blended_is_the_premultiplied_formula():
    before, after, mask = with_every_weight()
    mixed = np.array(blended(Image.fromarray(before), Image.fromarray(after), mask))[1:255].astype(float)
    weight = np.arange(1, 255)[:, None] / 255
    parts = [picture[1:255, :, 3] / 255 * part for picture, part in ((before, 1 - weight), (after, weight))]
    alpha = sum(parts)
    color = before[1:255, :, :3] * parts[0][..., None] + after[1:255, :, :3] * parts[1][..., None]
    seen = alpha > 0
    np.testing.assert_allclose(mixed[..., 3], alpha * 255, rtol=0, atol=0.501)
    np.testing.assert_allclose(mixed[seen, :3], color[seen] / alpha[seen, None], rtol=0, atol=0.501)
    assert not mixed[~seen].any()


def test_blended_never_shows_a_hidden_colour():
    _, _, mask = with_every_weight()
    red, green = Image.new("RGBA", mask.size, (255, 0, 0, 255)), Image.new("RGBA", mask.size, (0, 255, 0, 0))
    weights = np.array(mask)
    for mixed, alphas in ((blended(red, green, mask), 255 - weights), (blended(green, red, mask), weights)):
        pixels = np.array(mixed)
        assert np.array_equal(pixels[..., 3], alphas)
        assert (pixels[alphas > 0, :3] == (255, 0, 0)).all()


BLACK, WHITE, RED_MASK = (0, 0, 0), (255, 255, 255), (200, 30, 30)
MASKS = {  # colour and alpha of the left and the right half -> what is masked
    "black and white": ((*BLACK, 255), (*WHITE, 255), (0, 255)),
    "grey": ((*BLACK, 255), (128, 128, 128, 255), (0, 128)),
    "white, half there, on black": ((*BLACK, 255), (*WHITE, 128), (0, 128)),
    "white, hardly there, on black": ((*BLACK, 255), (*WHITE, 60), (0, 60)),
    "black, half there, on white": ((*WHITE, 255), (*BLACK, 128), (255, 0)),
    "white on nothing": ((*WHITE, 0), (*WHITE, 255), (0, 255)),
    "white, half there, on nothing": ((*BLACK, 0), (*WHITE, 128), (0, 128)),
    "black on nothing": ((*WHITE, 0), (*BLACK, 255), (0, 255)),
    "black, half there, on nothing": ((*WHITE, 0), (*BLACK, 128), (0, 128)),
    "a colour on nothing": ((*WHITE, 0), (*RED_MASK, 200), (0, 200)),
    "a colour on another": ((*WHITE, 100), (*RED_MASK, 200), (100, 200)),
    "nothing": ((*WHITE, 0), (*BLACK, 0), (0, 0)),
    "soft black beside a trace of white": ((*BLACK, 200), (*WHITE, 3), (200, 3)),
}


@pytest.mark.parametrize(("left", "right", "masked"), MASKS.values(), ids=MASKS)
def test_a_mask_is_white_as_far_as_it_is_there(left, right, masked):
    mask = as_mask(Image.fromarray(np.array([[left, right]], np.uint8)))
    assert mask.mode == "L"
    assert tuple(mask.getpixel((x, 0)) for x in (0, 1)) == masked


@pytest.mark.parametrize(
    ("mode", "value", "masked"), [("L", 77, 77), ("LA", (255, 77), 77), ("1", 1, 255), ("P", 0, 0)]
)
def test_a_mask_may_be_of_any_mode(mode, value, masked):
    assert as_mask(Image.new(mode, (2, 2), value)).getcolors() == [(4, masked)]


MODES = list(ResizeMode)
BANDS = np.array([[200, 0, 0], [0, 150, 0], [0, 0, 100], [90, 90, 90]], np.uint8)


def banded(upright: bool) -> Image.Image:
    """Four bands of 10 pixels beside each other, 20 pixels high; or, upright, above each other."""
    pixels = np.repeat(BANDS, 10, axis=0)[None].repeat(20, axis=0)
    return Image.fromarray(np.ascontiguousarray(pixels.swapaxes(0, 1)) if upright else pixels)


def fit_bands(upright: bool, mode: ResizeMode, length: int, breadth: int) -> np.ndarray:
    """What the bands become where they are `length` by `breadth`: [breadth, length, 4], whichever way they stood."""
    pixels = np.array(fit(banded(upright), mode, *((breadth, length) if upright else (length, breadth))))
    return pixels.swapaxes(0, 1) if upright else pixels


@settings(deadline=None)
@given(*[st.integers(1, 64)] * 4, st.sampled_from(MODES), st.sampled_from(["RGB", "RGBA", "L", "P"]))
def test_fit_gives_the_size_that_was_asked(width, height, new_width, new_height, mode, kind):
    image = Image.new(kind, (width, height))
    fitted = fit(image, mode, new_width, new_height)
    assert fitted.size == (new_width, new_height)
    if image.size == fitted.size:
        assert fitted is image
    else:
        assert fitted.mode == "RGBA"


@settings(deadline=None)
@given(*[st.integers(1, 40)] * 4, st.sampled_from(MODES), st.integers(0, 255))
def test_fit_of_one_color_is_that_color(width, height, new_width, new_height, mode, red):
    fitted = fit(Image.new("RGB", (width, height), (red, 9, 250)), mode, new_width, new_height)
    assert fitted.convert("RGBA").getcolors() == [(new_width * new_height, (red, 9, 250, 255))]


@pytest.mark.parametrize("mode", MODES)
def test_fit_of_an_image_of_that_size_is_the_image(mode):
    image = Image.new("P", (7, 5))
    assert fit(image, mode, 7, 5) is image


@pytest.mark.parametrize("upright", [False, True])
def test_just_resize_stretches(upright):
    stretched = fit_bands(upright, ResizeMode.JUST_RESIZE, 20, 40)
    assert (stretched == stretched[:1]).all()
    np.testing.assert_allclose(stretched[0, [1, 7, 12, 18], :3].astype(int), BANDS, atol=8)


@pytest.mark.parametrize("upright", [False, True])
def test_crop_and_resize_keeps_the_centre_and_cuts_the_longer_side(upright):
    whole = np.array(banded(False).convert("RGBA"))
    assert np.array_equal(fit_bands(upright, ResizeMode.CROP_AND_RESIZE, 20, 20), whole[:, 10:30])
    half = fit_bands(upright, ResizeMode.CROP_AND_RESIZE, 10, 10)
    assert (half == half[:1]).all()
    np.testing.assert_allclose(half[0, [1, 8], :3].astype(int), BANDS[1:3], atol=8)


@pytest.mark.parametrize("upright", [False, True])
def test_resize_and_fill_keeps_everything_and_fills_both_sides_alike(upright):
    filled = fit_bands(upright, ResizeMode.RESIZE_AND_FILL, 40, 60)
    whole = np.array(banded(False).convert("RGBA"))
    assert np.array_equal(filled[20:40], whole)
    for side in (filled[:20], filled[40:]):
        assert (side == side[0, 0]).all()
    half = fit_bands(upright, ResizeMode.RESIZE_AND_FILL, 20, 20)
    np.testing.assert_allclose(half[10, [1, 7, 12, 18], :3].astype(int), BANDS, atol=8)


@pytest.mark.parametrize(
    ("size", "kept", "outside"),
    [((16, 30), (0, 7, 16, 23), (8, 2)), ((30, 16), (7, 0, 23, 16), (2, 8))],
)
def test_resize_and_fill_takes_the_median_of_the_border(size, kept, outside):
    """Of the border only, and the median: neither the inside nor a few other pixels matter."""
    image = Image.new("RGB", (16, 16), (30, 60, 90))
    image.paste((255, 255, 255), (1, 1, 15, 15))
    image.paste((0, 255, 0), (0, 3, 1, 9))
    filled = fit(image, ResizeMode.RESIZE_AND_FILL, *size)
    assert filled.getpixel(outside) == (30, 60, 90, 255)
    assert filled.crop(kept) == image.convert("RGBA")


def test_resize_and_fill_of_an_image_with_a_transparent_border_fills_with_nothing():
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (4, 4, 12, 12))
    filled = fit(image, ResizeMode.RESIZE_AND_FILL, 16, 48)
    assert filled.crop((0, 0, 16, 16)).getchannel("A").getextrema() == (0, 0)
    assert filled.getpixel((8, 24)) == (0, 0, 255, 255)


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=25, deadline=None)
@given(*[st.integers(1, 40)] * 4, seeds)
def test_fit_never_shows_a_hidden_color(mode, width, height, new_width, new_height, seed):
    image = to_pil(random_rgba(height, width, seed)[0])
    pixels = np.array(image)
    pixels[pixels[..., 3] == 0, :3] ^= 255
    assume(image.size != (new_width, new_height))
    other = Image.fromarray(pixels)
    assert fit(other, mode, new_width, new_height) == fit(image, mode, new_width, new_height)


@pytest.mark.parametrize("mode", MODES)
def test_fit_keeps_the_color_of_a_subject_to_its_edge(mode):
    """Hidden green and visible red give no yellow where they meet."""
    image = Image.new("RGBA", (30, 30), (0, 255, 0, 0))
    image.paste((255, 0, 0, 255), (9, 9, 21, 21))
    pixels = np.array(fit(image, mode, 17, 13))
    seen = pixels[pixels[..., 3] > 0]
    assert len(np.unique(seen[:, 3])) > 2
    assert (seen[:, :3] == (255, 0, 0)).all()


def test_a_content_hash_is_that_of_the_pixels():
    red = Image.new("RGB", (4, 2), (255, 0, 0))
    hashes = [content_hash(image) for image in (red, red.convert("RGBA"), red.convert("P"), red.resize((2, 4)))]
    assert hashes[0] == hashes[1] == hashes[2] != hashes[3]
    assert len(hashes[0]) == 10
