"""Picture maths: against OpenCV where it has the same operation, else by what must hold for every picture."""

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lib_layerdiffuse.images import checkerboard, compose, from_pil, over_grey, pad_colors, shrink, to_pil

sides = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)


def random_rgba(height, width, seed=0, batch=1):
    """Random colours under a random alpha of which a good part is fully transparent or fully opaque."""
    generator = torch.Generator().manual_seed(seed)
    rgba = torch.rand(batch, 4, height, width, generator=generator)
    rgba[:, 3] = (rgba[:, 3] * 3 - 1).clamp(0, 1)
    return rgba


def cv2_pad_colors(rgba):
    """The method written with OpenCV's resizing, [H, W, 4] -> [H, W, 3]."""
    color, alpha = rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]
    levels = [(color, alpha)]
    while min(alpha.shape[:2]) > 1:
        size = (int(alpha.shape[1] / 1.2), int(alpha.shape[0] / 1.2))
        color = cv2.resize(color, size, interpolation=cv2.INTER_AREA).reshape(*size[::-1], 3)
        alpha = cv2.resize(alpha, size, interpolation=cv2.INTER_AREA).reshape(*size[::-1], 1)
        levels.append((color, alpha))
    padded = (color.sum((0, 1)) / max(alpha.sum(), 1e-8)).reshape(1, 1, 3)
    for color, alpha in reversed(levels):
        below = cv2.resize(padded, alpha.shape[1::-1], interpolation=cv2.INTER_LINEAR).reshape(*alpha.shape[:2], 3)
        padded = color + below * (1 - alpha)
    return padded


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


def test_over_grey():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    flat = over_grey(image)
    assert flat.mode == "RGB"
    assert [flat.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (128, 128, 128)]
    opaque = Image.new("RGB", (2, 1))
    assert over_grey(opaque) is opaque
