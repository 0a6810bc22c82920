"""Differential Diffusion: against the paper's loop, plain img2img and inpainting; and what its maps are made of."""

import base64
import io
from contextlib import suppress
from dataclasses import fields
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops
from torch.nn import functional as F

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.rgba import content_hash
from lib_layerdiffuse.request.differential import (
    FAN,
    FORM,
    MASK,
    SOURCES,
    TITLE,
    UPLOAD,
    Change,
    ChangeFields,
    check_changes,
    labelled,
    map_tensor,
    on_black,
    overlay_mask,
    released,
    remaining,
    softened,
    union,
    uses,
)

EDGES, INSIDE, OUTSIDE = "Alpha: edges", "Alpha: inside", "Alpha: outside"
ALPHAS = [EDGES, INSIDE, OUTSIDE]
LEVELS = np.arange(256)


# --- schedules, samplers and a toy model ------------------------------------------------------------------------


def karras(steps):
    """Karras et al., arXiv 2206.00364, equation 5."""
    low, high = 0.03 ** (1 / 7), 14.6 ** (1 / 7)
    return [*(np.linspace(high, low, steps) ** 7).tolist(), 0.0]


def ddim(steps):
    """Of timesteps evenly spread over the 1000 that Stable Diffusion was trained with."""
    alphas = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    alphas = alphas[np.linspace(999, 0, steps).round().astype(int)]
    return [*((1 - alphas) / alphas) ** 0.5, 0.0]


SCHEDULES = pytest.mark.parametrize("schedule", [karras, ddim])


def euler(model, x, sigmas):
    for sigma, following in pairwise(sigmas):
        x = x + (x - model(x, sigma)) / sigma * (following - sigma)
    return x


def heun(model, x, sigmas):
    for sigma, following in pairwise(sigmas):
        slope = (x - model(x, sigma)) / sigma
        there = x + slope * (following - sigma)
        if following:
            slope = (slope + (there - model(there, following)) / following) / 2
        x = x + slope * (following - sigma)
    return x


def dpm2(model, x, sigmas):
    for sigma, following in pairwise(sigmas):
        slope = (x - model(x, sigma)) / sigma
        if following:
            middle = (sigma * following) ** 0.5
            there = x + slope * (middle - sigma)
            slope = (there - model(there, middle)) / middle
        x = x + slope * (following - sigma)
    return x


def dpmpp_2m(model, x, sigmas):
    before, last = None, None
    for sigma, following in pairwise(sigmas):
        denoised = model(x, sigma)
        mixed = denoised
        if before is not None and following:
            ratio = np.log(before / sigma) / np.log(sigma / following)
            mixed = denoised + (denoised - last) / (2 * ratio)
        x = following / sigma * x + (1 - following / sigma) * mixed
        before, last = sigma, denoised
    return x


SAMPLERS = pytest.mark.parametrize("sampler", [euler, heun, dpm2, dpmpp_2m])

RANDOM = torch.Generator().manual_seed(0)
KERNEL = torch.randn(4, 4, 3, 3, generator=RANDOM, dtype=torch.float64) / 3
ORIGINAL, NOISE = torch.randn(2, 1, 4, 8, 32, generator=RANDOM, dtype=torch.float64)
ALL_LEVELS = torch.randperm(256, generator=RANDOM).view(1, 1, 8, 32)  # each value of a map at one pixel


def denoise(x, sigma):
    """Each pixel of the answer depends on its neighbours, as with a UNet."""
    return x / (sigma**2 + 1) + torch.tanh(F.conv2d(x, KERNEL, padding=1) / (sigma**2 + 1) ** 0.5)


def keeping(original, noise, free_at):
    """The model with what is not free held at the original: at its noise level before, without noise after."""

    def model(x, sigma):
        free = free_at(sigma)
        denoised = denoise(torch.where(free, x, original + sigma * noise), sigma)
        return torch.where(free, denoised, original)

    return model


def differential(sampler, levels, sigmas):
    """A run with a map of such levels (0 to 255, white is change)."""
    change = levels.float() / 255
    model = keeping(ORIGINAL, NOISE, lambda sigma: released(change, sigmas, sigma))
    return sampler(model, ORIGINAL + sigmas[0] * NOISE, sigmas)


def img2img(sampler, sigmas):
    return sampler(denoise, ORIGINAL + sigmas[0] * NOISE, sigmas)


def paper(kept, sigmas):
    """The paper's algorithm with Euler steps. kept: its map, in which 1 is white.

    Before each step, the original comes back where the map is kept; the step itself then moves everything. So white
    takes the last step, and only what is above 1 is the original in the end.
    """
    steps, latents = len(sigmas) - 1, torch.zeros_like(ORIGINAL)
    for step, sigma in enumerate(sigmas):
        back = kept > step / steps if step else torch.ones_like(kept, dtype=torch.bool)
        latents = torch.where(back, ORIGINAL + sigma * NOISE, latents)
        if step < steps:
            latents = latents + (latents - denoise(latents, sigma)) / sigma * (sigmas[step + 1] - sigma)
    return latents


def assert_equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def level_of(part):
    """A part of 1 as a map has it: the nearest of its values."""
    return int(255 * part + 0.5 + 1e-9)


def one_value_per_step(steps, random):
    """A map's values, and for how many steps each keeps its pixel."""
    kept_steps = random % (steps + 1)
    return torch.tensor([level_of(1 - kept / steps) for kept in range(steps + 1)])[kept_steps], kept_steps.double()


def needed(part):
    """The smallest map value that reaches a part of 1, in values and half a value less: a real number."""
    return 255 * part - 0.5


def first_steps(levels, sigmas):
    """For each map value, the step that releases it; the number of steps where none does."""
    change = torch.as_tensor(levels).float() / 255
    free = torch.stack([released(change, sigmas, sigma) for sigma in sigmas[:-1]])
    assert torch.equal(free, free.cummax(dim=0).values), "a pixel that was free is held again"
    return (len(free) - free.sum(0)).numpy()


# --- against the paper, img2img and inpainting ------------------------------------------------------------------


# What is kept during a step is kept to its end here. In the paper, that is a map that keeps for one step more.


@SCHEDULES
@pytest.mark.parametrize("steps", [1, 3, 5, 15, 17, 51, 85, 255])
def test_each_value_of_a_map_is_in_the_paper_one_that_keeps_for_one_step_more(steps, schedule):
    """Of numbers of steps that divide 255: each step's threshold is one of the 256 values."""
    sigmas = schedule(steps)
    kept = (255 - ALL_LEVELS + 255 // steps).double() / 255
    assert_equal(differential(euler, ALL_LEVELS, sigmas), paper(kept, sigmas))


@SCHEDULES
@pytest.mark.parametrize("steps", [2, 4, 7, 10, 12, 20, 28, 30, 50, 100])
def test_a_map_of_one_value_per_step_survives_its_256_values(steps, schedule):
    sigmas = schedule(steps)
    levels, kept_steps = one_value_per_step(steps, ALL_LEVELS)
    assert_equal(differential(euler, levels, sigmas), paper((kept_steps + 1) / steps, sigmas))


@SCHEDULES
@pytest.mark.parametrize("steps", [2, 5, 20])
def test_a_map_for_the_paper_is_one_of_a_step_s_worth_of_change_more(steps, schedule):
    sigmas = schedule(steps)
    kept_steps = ALL_LEVELS % (steps + 1)
    levels = torch.tensor([level_of(1 - max(0, kept - 1) / steps) for kept in range(steps + 1)])[kept_steps]
    assert_equal(differential(euler, levels, sigmas), paper(kept_steps / steps, sigmas))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=30, unique=True), st.integers(0, 2**32 - 1))
def test_any_schedule_and_map_give_what_the_paper_gives(sigmas, seed):
    sigmas = [*sorted(sigmas, reverse=True), 0.0]
    steps = len(sigmas) - 1
    generator = torch.Generator().manual_seed(seed)
    levels, kept_steps = one_value_per_step(steps, torch.randint(steps + 1, (1, 1, 8, 32), generator=generator))
    actual, expected = differential(euler, levels, sigmas), paper((kept_steps + 1) / steps, sigmas)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sampler", [euler, dpm2])
@SCHEDULES
@pytest.mark.parametrize("steps", [1, 7, 10, 20, 50])
def test_a_map_of_one_value_is_img2img_from_the_step_of_its_strength(steps, schedule, sampler):
    sigmas = schedule(steps)
    for start in range(steps):
        levels = torch.full((1, 1, 8, 32), level_of(1 - start / steps))
        assert_equal(differential(sampler, levels, sigmas), img2img(sampler, sigmas[start:]))


@SCHEDULES
@pytest.mark.parametrize("level", [1, 2, 9, 13, 14, 63, 100, 128, 200, 242, 243, 254, 255])
def test_a_map_of_any_one_value_is_img2img_from_the_first_step_that_it_reaches(level, schedule):
    sigmas = schedule(20)
    reached = [step for step in range(20) if level >= needed(1 - step / 20)]
    expected = img2img(euler, sigmas[reached[0] :]) if reached else ORIGINAL
    assert_equal(differential(euler, torch.full((1, 1, 8, 32), level), sigmas), expected)


@SCHEDULES
@pytest.mark.parametrize("sampler", [heun, dpmpp_2m])
def test_with_samplers_that_look_beyond_a_step_a_map_of_one_value_tends_to_img2img(sampler, schedule):
    """They take the kept original of the step before, or the free pixels of the one after, into a step's slope."""

    def error(steps):
        sigmas = schedule(steps)
        expected = img2img(sampler, sigmas[steps // 2 :])
        made = differential(sampler, torch.full((1, 1, 8, 32), 128), sigmas)
        return (made - expected).norm() / (expected - ORIGINAL).norm()

    assert error(200) < error(50) / 3 < error(12) / 6
    assert error(200) < 0.02


@SAMPLERS
@SCHEDULES
@pytest.mark.parametrize("steps", [1, 2, 9, 30])
def test_a_black_and_white_map_is_inpainting(steps, schedule, sampler):
    sigmas = schedule(steps)
    free = ALL_LEVELS > 99
    made = differential(sampler, free * 255, sigmas)
    inpainting = sampler(keeping(ORIGINAL, NOISE, lambda _: free), ORIGINAL + sigmas[0] * NOISE, sigmas)
    assert_equal(made, inpainting)
    if sampler is euler:
        assert_equal(made, paper((~free).double() + 1 / steps, sigmas))
    kept = ~free.expand_as(made)
    torch.testing.assert_close(made[kept], ORIGINAL[kept], rtol=0, atol=1e-12)
    assert ((made - ORIGINAL)[~kept].abs() > 1e-4).float().mean() > 0.9


@SAMPLERS
@SCHEDULES
@pytest.mark.parametrize("steps", [1, 20, 300])
def test_a_white_map_is_img2img_and_a_black_one_the_original(steps, schedule, sampler):
    sigmas = schedule(steps)
    assert torch.equal(differential(sampler, torch.tensor(255), sigmas), img2img(sampler, sigmas))
    black = differential(sampler, torch.tensor(0), sigmas)
    torch.testing.assert_close(black, ORIGINAL, rtol=0, atol=1e-12)


# --- when pixels are released -----------------------------------------------------------------------------------

COUNTS = [1, 2, 3, 4, 5, 7, 10, 13, 20, 25, 30, 50, 51, 100, 150, 255, 256, 400, 1000]


@SCHEDULES
@pytest.mark.parametrize("steps", COUNTS)
def test_the_more_a_pixel_may_change_the_earlier_it_is_released(steps, schedule):
    first = first_steps(LEVELS, schedule(steps))
    assert (np.diff(first) <= 0).all()
    assert first[255] == 0
    assert first[0] == steps  # never
    for level, step in enumerate(first):
        assert level == 0 or step == steps or level >= needed(1 - step / steps) - 1e-3
        assert step == 0 or level == 0 or level <= needed(1 - (step - 1) / steps) + 1e-3  # not a step too late


@pytest.mark.parametrize("steps", COUNTS)
def test_every_step_up_to_the_number_of_values_releases_something(steps):
    first = first_steps(LEVELS, ddim(steps))
    assert set(first) >= set(range(steps)) or steps > 255
    assert len(set(first)) == min(steps, 255) + 1


@SCHEDULES
def test_from_more_steps_than_values_on_the_darkest_grey_is_released(schedule):
    assert [first_steps([1], schedule(steps))[0] < steps for steps in (100, 255, 256, 1000)] == [
        False,
        True,
        True,
        True,
    ]


@SCHEDULES
@pytest.mark.parametrize("steps", [1, 8, 20, 50])
def test_a_sigma_of_single_precision_is_still_that_of_its_step(steps, schedule):
    """The schedule is read once, while the sampler computes with its own numbers."""
    sigmas = schedule(steps)
    levels = [level for level in LEVELS if min(abs(level - needed(i / steps)) for i in range(steps + 1)) > 1e-2]
    change = torch.tensor(levels).float() / 255
    for sigma in sigmas:
        assert torch.equal(released(change, sigmas, float(np.float32(sigma))), released(change, sigmas, sigma))


def test_each_map_of_a_batch_is_released_by_itself():
    change = torch.rand(3, 1, 5, 6, generator=torch.Generator().manual_seed(0))
    for sigma in karras(9):
        free = released(change, karras(9), sigma)
        assert (free.dtype, free.shape) == (torch.bool, change.shape)
        assert torch.equal(free, torch.cat([released(each, karras(9), sigma) for each in change]).view_as(change))


@SCHEDULES
@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
def test_remaining_counts_the_steps_that_are_left(steps, schedule):
    sigmas = schedule(steps)
    left = [remaining(sigmas, sigma) for sigma in sigmas]
    assert left == pytest.approx([1 - step / steps for step in range(steps + 1)], abs=1e-12)
    assert (left[0], left[-1]) == (1, 0)
    assert all(type(part) is float for part in left)


@pytest.mark.parametrize(
    ("sigmas", "sigma", "expected"),
    [
        ([8.0, 4.0, 1.0, 0.5, 0.0], 8.0, 1),
        ([8.0, 4.0, 1.0, 0.5, 0.0], 6.0, 0.875),
        ([8.0, 4.0, 1.0, 0.5, 0.0], 4.0, 0.75),
        ([8.0, 4.0, 1.0, 0.5, 0.0], 0.25, 0.125),
        ([8.0, 4.0, 1.0, 0.5, 0.0], 0.0, 0),
        ([8.0, 4.0, 1.0, 0.5, 0.0], 8.001, 1),  # Euler with churn looks above the first
        ([8.0, 4.0, 1.0, 0.5, 0.0], 1000.0, 1),
        ([8.0, 0.0], 2.0, 0.25),
        ([80, 40, 0], 60, 0.75),
    ],
)
def test_remaining(sigmas, sigma, expected):
    for given_as in (sigmas, tuple(sigmas), np.array(sigmas, np.float32)):
        assert remaining(given_as, sigma) == pytest.approx(expected)


@SCHEDULES
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_remaining_falls_evenly_between_steps(steps, schedule):
    """Where second-order samplers look."""
    sigmas = schedule(steps)
    for step, (sigma, following) in enumerate(pairwise(sigmas)):
        between = [remaining(sigmas, part) for part in np.linspace(sigma, following, 9)]
        assert between == pytest.approx(np.linspace(steps - step, steps - step - 1, 9) / steps)


@settings(deadline=None)
@given(st.lists(st.floats(0.001, 200), min_size=1, max_size=20, unique=True), *[st.floats(0, 300)] * 2)
def test_less_noise_never_means_more_steps_left_nor_fewer_free_pixels(sigmas, one, other):
    sigmas = [*sorted(sigmas, reverse=True), 0.0]
    less, more = sorted([one, other])
    assert 0 <= remaining(sigmas, less) <= remaining(sigmas, more) <= 1
    change = torch.tensor(LEVELS).float() / 255
    assert not (released(change, sigmas, more) & ~released(change, sigmas, less)).any()


# --- what maps are made of --------------------------------------------------------------------------------------


def grey(rows, mode="L"):
    return Image.fromarray(np.array(rows, np.uint8)).convert(mode)


def half_white(width=100, height=4):
    """The left half is white."""
    image = Image.new("L", (width, height))
    image.paste(255, (0, 0, width // 2, height))
    return image


def cut_out(alpha):
    """A picture with this alpha."""
    image = Image.new("RGBA", alpha.size, (200, 30, 60, 255))
    image.putalpha(alpha)
    return image


def disc(size=129, radius=40):
    distance = np.hypot(*np.mgrid[:size, :size] - size // 2)
    return cut_out(Image.fromarray(np.where(distance <= radius, 255, 0).astype(np.uint8)))


def change_of(source, upload=None, softness=16, columns=5):
    return Change(source, upload, softness, columns)


def values_of(source, init, mask=None, **options):
    made = change_of(source, **options).map(init, mask)
    assert (made.mode, made.size) == ("L", init.size)
    return np.array(made).astype(int)


def random_image(mode, width, height, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, len(mode)), np.uint8)
    return Image.fromarray(values.squeeze(2) if mode == "L" else values)


INIT = Image.new("RGB", (16, 16), "grey")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
@pytest.mark.parametrize("init", ["L", "LA", "P", "RGB", "RGBA"])
def test_an_uploaded_map_of_any_mode_is_its_brightness(mode, init):
    upload = half_white(16, 16)
    for colour in (upload, ImageChops.invert(upload)):
        made = values_of(UPLOAD, INIT.convert(init), upload=colour.convert(mode))
        assert np.array_equal(made, np.array(colour))


def test_every_grey_of_an_uploaded_map_stays_itself():
    upload = grey(LEVELS.reshape(16, 16))
    for mode in ("L", "RGB", "RGBA"):
        assert np.array_equal(values_of(UPLOAD, INIT, upload=upload.convert(mode)), LEVELS.reshape(16, 16))


@pytest.mark.parametrize(
    ("hidden", "alpha", "expected"),
    [(255, 0, 0), (0, 0, 0), (255, 255, 255), (0, 255, 0), (255, 128, 128), (128, 128, 64), (0, 128, 0)],
)
def test_what_is_transparent_in_an_uploaded_map_does_not_change(hidden, alpha, expected):
    upload = Image.new("RGBA", (16, 16), "white")
    upload.paste((hidden, hidden, hidden, alpha), (0, 0, 16, 8))
    for mode in ("RGBA", "LA"):
        made = values_of(UPLOAD, INIT, upload=upload.convert(mode))
        assert (abs(made[:8] - expected) <= 1).all()
        assert (made[8:] == 255).all()
        assert made[0, 0] == expected or 0 < alpha < 255


def test_the_transparent_colour_of_a_palette_does_not_change():
    upload = Image.new("P", (16, 16), 1)
    upload.putpalette([255, 255, 255, 255, 255, 255])
    upload.paste(0, (0, 0, 16, 8))
    upload.info["transparency"] = 0
    made = values_of(UPLOAD, INIT, upload=upload)
    assert not made[:8].any()
    assert (made[8:] == 255).all()


def test_on_black_shows_what_is_opaque():
    image = random_image("RGBA", 9, 7)
    colors, alpha = np.array(image)[..., :3].astype(int), np.array(image)[..., 3:].astype(int)
    shown = np.array(on_black(image))
    assert (shown[..., 3] == 255).all()
    np.testing.assert_allclose(shown[..., :3], colors * alpha / 255, atol=1)
    assert on_black(image.convert("RGB")) == image.convert("RGB").convert("RGBA")


@pytest.mark.parametrize("size", [(3, 5), (16, 16), (40, 10), (200, 300)])
def test_an_uploaded_map_is_brought_to_the_size_of_the_picture(size):
    init = Image.new("RGB", (60, 20))
    assert (values_of(UPLOAD, init, upload=Image.new("L", size, 77)) == 77).all()
    made = values_of(UPLOAD, init, upload=half_white(*size))
    middle = slice(20, 40)
    assert (made[:, : middle.start - 10] == 255).all()
    assert not made[:, middle.stop + 10 :].any()
    assert (np.diff(made[:, middle].mean(axis=0)) <= 0).all()


@pytest.mark.parametrize("mode", ["1", "L"])
def test_a_mask_without_softness_is_the_map(mode):
    mask = half_white(16, 16)
    assert np.array_equal(values_of(MASK, INIT, mask.convert(mode).convert("L"), softness=0), np.array(mask))


def test_a_mask_is_brought_to_the_size_of_the_picture():
    made = values_of(MASK, INIT, half_white(160, 80), softness=0)
    assert (made[:, :7] == 255).all()
    assert not made[:, 9:].any()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_softened_by_nothing_is_the_same(width, height, seed):
    mask = random_image("L", width, height, seed)
    assert np.array_equal(np.array(softened(mask, 0)), np.array(mask))


@pytest.mark.parametrize("pixels", [1, 2, 5, 16, 40, 100, 256])
def test_softened_an_edge_is_half_and_alike_on_both_sides(pixels):
    made = np.array(softened(half_white(1200), pixels)).astype(int)
    assert (made == made[0]).all()
    row = made[0]
    assert (np.diff(row) <= 0).all()
    assert (abs(row + row[::-1] - 255) <= 3).all()
    assert abs(row[599] + row[600] - 255) <= 3
    spread = np.flatnonzero((row > 15) & (row < 240)).size
    assert pixels * 1.2 - 1 <= spread <= pixels * 2 + 2  # to both sides
    assert row[: 600 - 2 * pixels].min(initial=255) >= 254
    assert row[600 + 2 * pixels :].max(initial=0) <= 1


def test_softness_moves_a_mask_in_both_directions():
    made = values_of(MASK, Image.new("RGB", (100, 4)), half_white(), softness=16)[0]
    assert 120 < made[49:51].mean() < 135
    assert 128 < made[45] < 255
    assert 0 < made[54] < 127


@pytest.mark.parametrize("softness", [4, 8, 16, 30])
def test_the_edge_map_is_brightest_at_the_edge_and_fades_with_its_softness(softness):
    made = values_of(EDGES, disc(), softness=softness)[64, 64:]  # from the centre to the right
    brightest = int(made.argmax())
    assert abs(brightest - 40) <= 2 + softness / 10  # a curved edge moves inwards when it is blurred
    assert made[brightest] > 255 * (1 - 1.5 / softness)
    assert (np.diff(made[: brightest + 1]) >= 0).all()
    assert (np.diff(made[brightest:]) <= 0).all()
    assert (made[41 + 2 * softness :] <= 2).all()
    assert (made[: max(0, 39 - 2 * softness)] <= 2).all()
    wider = values_of(EDGES, disc(), softness=softness * 1.5)
    assert wider.sum() > 1.2 * values_of(EDGES, disc(), softness=softness).sum()


def test_inside_and_outside_of_an_alpha_lie_to_both_sides_of_its_edge():
    inside, outside = (values_of(source, disc(), softness=8)[64, 64:] for source in (INSIDE, OUTSIDE))
    assert (inside[:28] >= 254).all() and not inside[42:].any()
    assert (outside[54:] >= 254).all() and not outside[:38].any()
    assert (np.diff(inside) <= 0).all()
    assert (np.diff(outside) >= 0).all()


@settings(max_examples=40, deadline=None)
@given(*[st.integers(2, 40)] * 2, st.floats(0, 30), st.integers(0, 2**32 - 1))
def test_edges_inside_and_outside_of_an_alpha_add_up_and_the_latter_never_overlap(width, height, softness, seed):
    init = random_image("RGBA", width, height, seed)

    def made(source):
        try:
            return values_of(source, init, softness=softness)
        except LayerDiffuseError:
            return np.zeros((height, width), int)  # black all over

    edges, inside, outside = map(made, ALPHAS)
    assert not np.minimum(inside, outside).any()
    assert (edges + inside + outside == 255).all()


def test_alpha_maps_without_softness_follow_the_alpha():
    init = cut_out(grey(LEVELS.reshape(16, 16)))
    edges, inside, outside = (values_of(source, init, softness=0).ravel() for source in ALPHAS)
    assert edges.tolist() == [255 - abs(2 * level - 255) for level in LEVELS]
    assert inside.tolist() == [max(0, 2 * level - 255) for level in LEVELS]
    assert outside.tolist() == [max(0, 255 - 2 * level) for level in LEVELS]


def test_a_transparent_palette_colour_is_an_alpha():
    init = Image.new("P", (16, 16), 1)
    init.putpalette([0, 0, 0, 255, 255, 255])
    init.paste(0, (0, 0, 16, 8))
    init.info["transparency"] = 0
    made = values_of(INSIDE, init, softness=0)
    assert not made[:8].any()
    assert (made[8:] == 255).all()


@pytest.mark.parametrize("size", [(512, 8), (97, 3), (16, 1), (1000, 2)])
@pytest.mark.parametrize("columns", [2, 3, 5, 7, 11, 16])
def test_a_fan_has_a_value_for_each_column_up_to_white(columns, size):
    made = values_of(FAN, Image.new("RGB", size), columns=columns)
    assert (made == made[0]).all()
    values, widths = np.unique(made[0], return_counts=True)
    assert (np.diff(made[0]) >= 0).all()
    assert len(values) == columns
    assert values[-1] == 255
    assert np.ptp(widths) <= 1
    for column, value in enumerate(values):
        assert Fraction(column + 1, columns) <= Fraction(int(value), 255) < Fraction(column + 1, columns) + 1 / 255


@SCHEDULES
@pytest.mark.parametrize("columns", range(2, 17))
def test_a_column_of_a_fan_starts_with_the_step_of_its_strength(columns, schedule):
    values = np.unique(values_of(FAN, Image.new("RGB", (64, 1)), columns=columns))
    for steps in (1, 4, 5, 7, 10, 12, 20, 30, 48, 50):
        for column, first in enumerate(first_steps(values, schedule(steps))):
            part = Fraction(column + 1, columns)
            by_strength = [step for step in range(steps) if Fraction(steps - step, steps) <= part]
            a_bit_more = [step for step in range(steps) if Fraction(steps - step, steps) <= part + Fraction(3, 510)]
            assert min(a_bit_more, default=steps) <= first <= min(by_strength, default=steps)


@pytest.mark.parametrize(
    ("columns", "strength", "steps", "expected"),
    [
        (2, 1, 2, [0.5, 1]),
        (5, 0.75, 20, [0.15, 0.3, 0.45, 0.6, 0.75]),
        (4, 0.5, 2, [0, 0.25, 0.25, 0.5]),
        (3, 0.9, 1, [0, 0, 0.9]),
        (16, 0.5, 5, [0] * 3 + [0.1] * 3 + [0.2] * 3 + [0.3] * 3 + [0.4] * 3 + [0.5]),
    ],
)
def test_strengths_of_a_fan_are_those_that_so_many_steps_make(columns, strength, steps, expected):
    assert change_of(FAN, columns=columns).strengths(strength, steps) == pytest.approx(expected)


@SCHEDULES
@pytest.mark.parametrize("columns", [2, 5, 16])
@pytest.mark.parametrize("steps", [1, 4, 7, 20, 50])
def test_the_strength_of_a_column_is_the_share_of_steps_that_change_it(steps, columns, schedule):
    values = np.unique(values_of(FAN, Image.new("RGB", (64, 1)), columns=columns))
    changed = [steps - first for first in first_steps(values, schedule(steps))]
    assert change_of(FAN, columns=columns).strengths(1, steps) == pytest.approx([each / steps for each in changed])


@pytest.mark.parametrize(
    ("columns", "steps", "different"), [(16, 5, 6), (5, 3, 4), (3, 1, 2), (5, 4, 0), (2, 1, 0), (5, 20, 0), (16, 16, 0)]
)
def test_columns_of_a_fan_that_are_alike_are_noted(columns, steps, different):
    change = change_of(FAN, columns=columns)
    found = list(change.notes(change.map(Image.new("RGB", (64, 8)), None), steps))
    said = f"{steps} steps of sampling make {different} different results of {columns} columns"
    assert [said in note for note in found] == [True] * (different > 0)


@pytest.mark.parametrize(
    ("level", "steps", "darkest"), [(13, 20, 0), (12, 20, 13), (40, 5, 51), (50, 5, 51), (51, 5, 0), (1, 255, 0)]
)
def test_greys_of_an_uploaded_map_that_never_change_are_noted(level, steps, darkest):
    upload = half_white(16, 16)
    upload.paste(level, (8, 0, 16, 12))
    change = change_of(UPLOAD, upload=upload)
    found = list(change.notes(change.map(Image.new("RGB", (16, 16)), None), steps))
    said = [f"darker than {darkest} of 255, which is 43% of what is not black" in note for note in found]
    assert said == [True] * (darkest > 0), found


@pytest.mark.parametrize("source", [source for source in SOURCES if source not in (UPLOAD, FAN)])
def test_what_fades_out_by_itself_is_not_noted(source):
    change = change_of(source, softness=64)
    assert not list(change.notes(change.map(disc(), half_white(*disc().size)), 5))


@pytest.mark.parametrize(
    ("levels", "steps", "refused"),
    [
        ([127], 1, True),
        ([255], 1, False),
        ([30], 5, True),
        ([51], 5, False),
        ([255, 30], 5, True),
        ([255, 60], 5, False),
    ],
)
def test_a_map_that_is_too_dark_for_its_steps_is_refused(levels, steps, refused):
    change = map_tensor([grey(np.full((8, 8), level)) for level in levels], 1, 1)
    if not refused:
        check_changes(change, steps)
        return
    with pytest.raises(
        LayerDiffuseError, match=f"With {steps} steps .* be {1 / steps:.2f} .* is {min(levels) / 255:.2f}"
    ):
        check_changes(change, steps)


@pytest.mark.parametrize("source", SOURCES)
def test_only_a_fan_is_there_to_choose_a_strength_by(source):
    assert change_of(source).fans is (source == FAN)


@pytest.mark.parametrize("source", [source for source in SOURCES if source != MASK])
def test_a_mask_limits_other_sources(source):
    init = disc()
    upload = Image.new("L", (5, 5), 190)
    mask = half_white(129, 129)
    free = values_of(source, init, upload=upload)
    limited = values_of(source, init, mask, upload=upload)
    white = np.array(mask) == 255
    assert np.array_equal(limited[white], free[white])
    assert not limited[~white].any()
    dimmed = values_of(source, init, Image.new("L", init.size, 128), upload=upload)
    np.testing.assert_allclose(dimmed, free * (128 / 255), atol=1)
    assert np.array_equal(values_of(source, init, Image.new("L", init.size, 255), upload=upload), free)


def test_a_mask_is_not_taken_twice_where_it_is_the_source():
    grey_mask = Image.new("L", (16, 16), 100)
    assert (values_of(MASK, INIT, grey_mask, softness=0) == 100).all()


def test_a_limiting_mask_is_brought_to_the_size_of_the_picture():
    made = values_of(UPLOAD, INIT, half_white(320, 80), upload=Image.new("L", (4, 4), 255))
    assert (made[:, :7] == 255).all()
    assert not made[:, 9:].any()


BLACK_ALL_OVER = ["black all over", "nothing would change", "White is what changes."]
OPAQUE_ALPHA = ["the transparency of the picture, which has none", "Start from a picture with transparency"]
WHITE_UPLOAD = {"upload": Image.new("L", (4, 4), 255)}


@pytest.mark.parametrize(
    ("source", "init", "mask", "options", "said"),
    [
        (UPLOAD, INIT, None, {}, ["no change map", "the Map box", "map_image", "another source (Change Map)"]),
        (UPLOAD, INIT, half_white(16, 16), {}, ["no change map", "map_image"]),
        (MASK, INIT, None, {}, ['the inpaint mask ("Inpaint mask")', "Draw one in the Inpaint tab", "as mask"]),
        *((source, INIT, None, {}, OPAQUE_ALPHA) for source in ALPHAS),
        *((source, INIT.convert("RGBA"), half_white(16, 16), {}, OPAQUE_ALPHA) for source in ALPHAS),
        (UPLOAD, INIT, None, {"upload": Image.new("RGB", (4, 4))}, ['("Uploaded map")', *BLACK_ALL_OVER]),
        (UPLOAD, INIT, None, {"upload": Image.new("RGBA", (4, 4), (255, 255, 255, 0))}, BLACK_ALL_OVER),
        (UPLOAD, INIT, ImageChops.invert(half_white(16, 16)), {"upload": half_white(16, 16)}, BLACK_ALL_OVER),
        (UPLOAD, INIT, Image.new("L", (16, 16)), WHITE_UPLOAD, BLACK_ALL_OVER),
        (MASK, INIT, Image.new("L", (16, 16)), {}, ['("Inpaint mask")', *BLACK_ALL_OVER]),
        (EDGES, disc(), None, {"softness": 0}, ['("Alpha: edges")', *BLACK_ALL_OVER]),
        (EDGES, cut_out(Image.new("L", (16, 16))), None, {}, BLACK_ALL_OVER),
        (INSIDE, cut_out(Image.new("L", (16, 16))), None, {}, BLACK_ALL_OVER),
        (FAN, INIT, Image.new("L", (16, 16)), {}, ['("Strength fan")', *BLACK_ALL_OVER]),
    ],
)
def test_what_makes_no_map_is_refused_with_what_to_do(source, init, mask, options, said):
    with pytest.raises(LayerDiffuseError) as caught:
        change_of(source, **options).map(init, mask)
    for words in said:
        assert words in str(caught.value)
    assert str(caught.value).endswith(".")


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(list(SOURCES)),
    *[st.sampled_from(["L", "RGB", "RGBA"])] * 2,
    *[st.integers(1, 30)] * 4,
    st.booleans(),
    st.floats(0, 256),
    st.integers(2, 16),
)
def test_any_pictures_end_in_a_map_or_a_sentence(
    source, init_mode, upload_mode, width, height, upload_width, upload_height, masked, softness, columns
):
    init = random_image(init_mode, width, height)
    upload = random_image(upload_mode, upload_width, upload_height)
    mask = random_image("L", upload_width, upload_height) if masked else None
    with suppress(LayerDiffuseError):
        assert values_of(source, init, mask, upload=upload, softness=softness, columns=columns).any()


# --- what the panel and API clients send ------------------------------------------------------------------------

NAMES = [row.name for row in fields(ChangeFields)]
PIXELS = np.arange(5 * 7 * 4, dtype=np.uint8).reshape(5, 7, 4)


def in_base64(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


SENT = in_base64(Image.fromarray(PIXELS))


def test_order_and_defaults_are_those_clients_rely_on():
    assert ", ".join(NAMES) == "enabled, source, map_image, softness, columns"
    assert [getattr(ChangeFields(), name) for name in NAMES] == [False, "Uploaded map", None, 16, 5]
    assert list(SOURCES) == [UPLOAD, MASK, EDGES, INSIDE, OUTSIDE, FAN]


@pytest.mark.parametrize(
    "args", [[], [False], ["false", "no such source"], [{"enabled": False, "nonsense": 1}], [None]]
)
def test_off_looks_no_further(args):
    assert Change.parse(args) is None


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([True], change_of(UPLOAD)),
        ([{}], change_of(UPLOAD)),
        ([True, None, None, None, None], change_of(UPLOAD)),
        ([True, "Inpaint mask", "", 8], change_of(MASK, softness=8)),
        ([{"source": "inpaint MASK", "softness": "2.5"}], change_of(MASK, softness=2.5)),
        ([{"source": "strength fan", "columns": 16}, "Uploaded map", None, 16, 5], change_of(FAN, columns=16)),
        ([True, "Alpha: edges", None, 0, "7"], change_of(EDGES, softness=0, columns=7)),
        ([{"enabled": True, "source": "ALPHA: OUTSIDE", "softness": 256}], change_of(OUTSIDE, softness=256)),
    ],
)
def test_parse(args, expected):
    change = Change.parse(args)
    assert change == expected
    assert type(change.columns) is int


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_by_its_name_in_any_case(source):
    for name in (source, source.upper(), source.lower()):
        assert Change.parse([{"source": name}]).source == source


@pytest.mark.parametrize("raw", [SENT, f"data:image/png;base64,{SENT}", PIXELS, Image.fromarray(PIXELS)], ids=type)
def test_a_sent_map_is_decoded(raw):
    for args in ([True, UPLOAD, raw], [{"map_image": raw}]):
        assert np.array_equal(np.array(Change.parse(args).upload), PIXELS)


def test_a_depth_map_of_16_bits_keeps_its_range():
    depth = Image.fromarray((LEVELS * 257).astype(np.uint16).reshape(16, 16))
    change = Change.parse([{"map_image": in_base64(depth)}])
    assert np.array_equal(np.array(change.map(INIT, None)), LEVELS.reshape(16, 16))


@pytest.mark.parametrize(
    ("named", "shown", "remedy"),
    [
        ({"source": "a depth map"}, "Change Map (source in API calls) is 'a depth map'", '"Inpaint mask"'),
        ({"source": 0}, "Change Map (source in API calls) is 0", '"Strength fan"'),
        ({"source": []}, "[]", '"Alpha: edges"'),
        ({"map_image": "a cat"}, "Map (map_image in API calls) is 'a cat'", "PNG, JPG or WebP file in base64"),
        ({"softness": -1}, "Softness (softness in API calls) is -1", "a number of pixels from 0 to 256"),
        ({"softness": 256.5}, "256.5", "from 0 to 256"),
        ({"softness": float("nan")}, "nan", "from 0 to 256"),
        ({"columns": 1}, "Columns (columns in API calls) is 1", "a whole number from 2 to 16"),
        ({"columns": 17}, "17", "a whole number from 2 to 16"),
        ({"columns": 2.5}, "2.5", "a whole number from 2 to 16"),
        ({"columns": True}, "True", "a whole number from 2 to 16"),
        ({"enabled": "maybe"}, "Enable (enabled in API calls) is 'maybe'", "true or false"),
        ({"map": SENT}, f"{TITLE} has no setting 'map'", '"map_image"'),
    ],
)
def test_a_wrong_value_is_named_with_the_remedy(named, shown, remedy):
    with pytest.raises(LayerDiffuseError) as caught:
        Change.parse([named])
    assert shown in str(caught.value)
    assert remedy in str(caught.value)


def test_too_many_values():
    with pytest.raises(LayerDiffuseError, match=f"{TITLE} takes 5 values, but 6 came"):
        Change.parse([True, UPLOAD, None, 16, 5, "one more"])


@pytest.mark.parametrize(
    ("source", "used"),
    [
        (UPLOAD, {}),
        (MASK, {"softness": 9}),
        (EDGES, {"softness": 9}),
        (INSIDE, {"softness": 9}),
        (OUTSIDE, {"softness": 9}),
        (FAN, {"columns": 3}),
    ],
)
def test_infotext_has_only_what_the_source_uses(source, used):
    upload = Image.new("L", (2, 2))
    change = change_of(source, upload=upload, softness=9, columns=3)
    image = {f"{TITLE} map image": content_hash(upload)} if source == UPLOAD else {}
    assert change.infotext == {TITLE: source} | {f"{TITLE} {name}": value for name, value in used.items()} | image
    assert {name for name, needed_there in uses(source).items() if needed_there} - {"map_image"} == set(used)
    assert uses(source)["map_image"] is (source == UPLOAD)


# --- maps around the sampling -----------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50, 255, 1000])
def test_overlay_is_whole_from_one_step_s_worth_of_change_on(steps):
    made = np.array(overlay_mask(grey(LEVELS.reshape(16, 16)), steps)).ravel()
    assert made[0] == 0
    assert (made[LEVELS * steps >= 255] == 255).all()
    proportional = np.minimum(LEVELS * steps, 255)
    assert (abs(made - proportional) < steps / 2 + 1).all()  # of half a value
    assert (made[(LEVELS + 0.5) * steps >= 255][1:] == 255).all()  # what `released` frees at the last step
    assert (np.diff(made.astype(int)) >= 0).all()
    assert made[1:].min() > 0


def test_union_is_where_any_map_changes_something():
    maps = [random_image("L", 9, 7, seed) for seed in range(3)]
    assert np.array_equal(np.array(union(maps)), np.max([np.array(each) for each in maps], axis=0))
    assert union(maps[:1]) == maps[0]


LABELLED = pytest.mark.parametrize(
    ("width", "columns"), [(128, 2), (128, 16), (64, 16), (97, 3), (512, 5), (1000, 3), (1024, 16), (2048, 5)]
)


def strengths(columns):
    return [f"{strength:.2f}" for strength in change_of(FAN, columns=columns).strengths(0.75, 100)]


@LABELLED
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_labels_stand_below_the_picture(width, columns, mode):
    picture = random_image(mode, width, 50)
    made = labelled(picture, strengths(columns))
    assert (made.mode, made.width) == ("RGB", width)
    assert made.height > 50
    assert made.crop((0, 0, width, 50)) == picture.convert("RGB")


@LABELLED
def test_each_column_has_its_label(width, columns):
    made = labelled(Image.new("RGB", (width, 20)), strengths(columns))
    strip = np.array(made)[20:].max(axis=2)
    starts = [round(column * width / columns) for column in range(columns + 1)]
    for left, right in pairwise(starts):
        assert strip[:, left:right].max() > 127
        if right - left >= 40:  # there is room for it
            assert not strip[:, [left, right - 1]].any()
            inked = np.flatnonzero(strip[:, left:right].any(axis=0))
            assert abs(inked[[0, -1]].mean() - (right - left - 1) / 2) < 0.1 * (right - left)
    assert not strip[[0, -1]].any()  # nothing is cut off
    assert made.height < 20 + width


def test_labels_of_different_strengths_differ():
    strip = labelled(Image.new("RGB", (400, 9)), ["0.25", "0.75"]).crop((0, 9, 400, 90))
    assert strip.crop((0, 0, 200, 81)) != strip.crop((200, 0, 400, 81))


def test_a_map_as_the_unet_meets_it_has_the_mean_of_each_cell():
    maps = [random_image("L", 40, 24, seed) for seed in range(3)]
    made = map_tensor(maps, 3, 5)
    expected = np.stack([np.array(each).reshape(3, 8, 5, 8).mean(axis=(1, 3)) for each in maps]) / 255
    assert (made.shape, made.dtype) == ((3, 1, 3, 5), torch.float32)
    torch.testing.assert_close(made[:, 0], torch.from_numpy(expected).float())


@settings(max_examples=30, deadline=None)
@given(*[st.integers(1, 40)] * 4, st.integers(0, 255))
def test_a_map_of_one_value_keeps_it_at_every_size(width, height, new_width, new_height, level):
    made = map_tensor([Image.new("L", (width, height), level)], new_height, new_width)
    torch.testing.assert_close(made, torch.full((1, 1, new_height, new_width), level / 255))


def test_a_cell_is_held_to_the_end_only_where_all_its_pixels_are_and_free_at_once_only_where_all_are():
    first, last = 0.9, 0.0
    spot, hole = Image.new("L", (16, 8)), Image.new("L", (16, 8), 255)
    spot.paste(255, (0, 0, 4, 4))
    hole.paste(0, (0, 0, 4, 4))
    change = map_tensor([spot, hole], 1, 2)
    sigmas = [first, 0.5, 0.2, last]
    assert released(change, sigmas, first).flatten().tolist() == [False, False, False, True]
    assert released(change, sigmas, last).flatten().tolist() == [True, False, True, True]


@pytest.mark.parametrize("source", SOURCES)
def test_settings_come_back_from_the_infotext(source):
    change = change_of(source, upload=Image.new("L", (2, 2)), softness=9, columns=3)
    parameters = {key: str(value) for key, value in change.infotext.items()}
    back = {name: FORM.pasted(name, parameters) for name in ("enabled", "source", "softness", "columns", "map_image")}
    used = uses(source)
    expected = {"softness": 9 if used["softness"] else 16, "columns": 3 if used["columns"] else 5}
    assert back == {"enabled": True, "source": source, "map_image": None, **expected}
