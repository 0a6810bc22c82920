"""What is said with the result of a request that can run, and silence where there is nothing to say."""

from collections.abc import Sequence

import pytest
from PIL import Image, ImageOps

from lib_layerdiffuse.methods import METHODS, Layer, Method, find_method
from lib_layerdiffuse.request.advice import alpha_note, notes, sampler_for
from lib_layerdiffuse.request.layers import Request
from training.scenes import scene, to_image

SIZE = (8, 6)
DPM = "DPM++ 2M SDE"
TRANSPARENT_PALETTE = Image.new("P", SIZE)
TRANSPARENT_PALETTE.info["transparency"] = 0


def picture(alphas: Sequence[int] = (0, 255), size: tuple[int, int] = SIZE) -> Image.Image:
    """One with these alphas, by turns."""
    image = Image.new("RGBA", size, (9, 8, 7, 0))
    image.putalpha(Image.frombytes("L", size, bytes(alphas[i % len(alphas)] for i in range(size[0] * size[1]))))
    return image


def noted(method: str, sampler: str = "Euler a", **values: object) -> list[str]:
    """The notes on a request with all the images that the method takes, unless others are given."""
    images = {f"{layer.value}_image": picture() for layer in find_method(method).inputs}
    request = Request.parse([{"method": method} | images | values])
    assert request is not None
    return list(notes(request, *SIZE, sampler))


def only(found: list[str], *parts: str) -> bool:
    [note] = found
    return all(part in note for part in parts)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_silence_where_there_is_nothing_to_say(method: Method) -> None:
    prompts = {f"{layer.value}_prompt": "a cat" for layer in method.outputs}
    assert noted(method.key, **prompts) == []


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_an_image_that_the_method_does_not_take_is_named(method: Method) -> None:
    for layer in set(Layer) - set(method.inputs):
        surplus = picture([255], (3, 3))  # neither its size nor its alpha matters
        assert only(noted(method.key, **{f"{layer.value}_image": surplus}), method.full_title, f"no {layer.word} image")


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_a_prompt_for_what_the_method_does_not_make_is_named(method: Method) -> None:
    for layer in set(Layer) - set(method.outputs):
        found = noted(method.key, **{f"{layer.value}_prompt": "a cat"})
        assert only(found, method.full_title, f"makes no {layer.word}", f"the {layer.word} prompt was not used")


@pytest.mark.parametrize("mode", ["Just Resize", "Crop and Resize", "Resize and Fill"])
@pytest.mark.parametrize(("name", "word"), [("bg_image", "background"), ("blend_image", "blend")])
@pytest.mark.parametrize("size", [(16, 5), (16, 6), (8, 5), (6, 8)])
def test_a_resized_image_is_named_with_both_sizes_and_the_mode(
    size: tuple[int, int], name: str, word: str, mode: str
) -> None:
    found = noted("xl_bgble2fg", resize_mode=mode, **{name: picture(size=size)})
    assert only(found, f"The {word} image of {size[0]}x{size[1]} was brought to 8x6", f"({mode})")


@pytest.mark.parametrize(
    "image",
    [picture([255]), Image.new("RGB", SIZE), Image.new("L", SIZE), Image.new("P", SIZE)],
    ids=["RGBA", "RGB", "L", "P"],
)
def test_an_opaque_foreground_is_named(image: Image.Image) -> None:
    assert only(noted("xl_fg2ble", fg_image=image), "foreground image has no transparency")


@pytest.mark.parametrize("image", [picture([0]), Image.new("LA", SIZE), TRANSPARENT_PALETTE], ids=["RGBA", "LA", "P"])
def test_a_fully_transparent_foreground_is_named(image: Image.Image) -> None:
    assert only(noted("xl_fg2ble", fg_image=image), "foreground image is fully transparent")


@pytest.mark.parametrize("alphas", [(0, 1), (254, 255), (128,), (0, 255)])
def test_any_other_foreground_needs_no_note(alphas: tuple[int, ...]) -> None:
    assert noted("xl_fg2ble", fg_image=picture(alphas)) == []


@pytest.mark.parametrize("alpha", [0, 255])
def test_only_a_foreground_is_expected_to_have_an_alpha(alpha: int) -> None:
    assert noted("xl_bgble2fg", bg_image=picture([alpha]), blend_image=picture([alpha])) == []


@pytest.mark.parametrize(("method", "step"), [("xl_everything", "xl_fgble2bg"), ("xl_bg2blefg", "xl_bgble2fg")])
@pytest.mark.parametrize("sampler", [DPM, "DPM fast", "DPM2 a"])
def test_a_dpm_sampler_is_named_with_the_step_that_goes_without(method: str, step: str, sampler: str) -> None:
    assert only(noted(method, sampler), sampler, f"step {step}", "sampled with Euler a")


@pytest.mark.parametrize("method", [method for method in METHODS if not method.chain], ids=lambda method: method.key)
def test_a_method_alone_keeps_its_sampler(method: Method) -> None:
    assert noted(method.key, DPM) == []


@pytest.mark.parametrize(
    ("avoids", "sampler", "expected"),
    [
        ("DPM", DPM, "Euler a"),
        ("DPM", "Euler a", "Euler a"),
        ("DPM", "Euler", "Euler"),
        ("DPM", "DDIM", "DDIM"),
        ("", DPM, DPM),
    ],
)
def test_sampler_for(avoids: str, sampler: str, expected: str) -> None:
    assert sampler_for(avoids, sampler) == expected


def test_everything_there_is_to_say() -> None:
    found = noted(
        "xl_bg2blefg", DPM, fg_image=picture(), bg_image=picture(size=(4, 4)), bg_prompt="a desk", fg_prompt="a cat"
    )
    for part in ("no foreground image", "background prompt was not used", "of 4x4", DPM):
        assert only([note for note in found if part in note], part)
    assert len(found) == 4


def with_alphas(*parts: tuple[int, int]) -> Image.Image:
    """A picture of 100x100 pixels, for each part its alpha and its number of pixels."""
    alpha = Image.frombytes("L", (100, 100), b"".join(bytes([value]) * count for value, count in parts))
    return Image.merge("RGBA", [alpha] * 4)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (((255, 10000),), "opaque"),
        (((240, 9950), (0, 50)), "opaque"),
        (((255, 9800), (0, 200)), "with a background: 98% of it is opaque"),
        (((255, 9100), (0, 900)), "with a background: 91% of it is opaque"),
        (((220, 9800), (0, 200)), "with a background: 0% of it is opaque, and its border to 71%"),
        (((255, 5000), (0, 5000)), None),
        (((128, 10000),), None),
        (((0, 9800), (255, 200)), None),
        (((10, 9950), (255, 50)), "empty"),
        (((0, 10000),), "empty"),
    ],
)
def test_pictures_without_a_subject_or_without_transparency_are_noted(
    parts: Sequence[tuple[int, int]], said: str | None
) -> None:
    note = alpha_note(with_alphas(*parts))
    assert note is None if said is None else note and f"came out {said}" in note and "plain grey background" in note


@pytest.mark.parametrize(("strip", "noted"), [(3, True), (6, False)])
def test_nearly_all_counts_whatever_is_along_the_border(strip: int, noted: bool) -> None:
    picture = Image.new("RGBA", (100, 100))
    picture.paste((0, 0, 0, 255), (strip, 0, 100 - strip, 100))
    assert bool(alpha_note(picture)) is noted


@pytest.mark.parametrize("index", range(60))
def test_a_subject_alone_is_not_noted_and_one_that_is_a_hole_in_its_background_is(index: int) -> None:
    alone = to_image(scene(index).rgba)
    hole = alone.copy()
    hole.putalpha(ImageOps.invert(alone.getchannel("A")))
    assert alpha_note(alone) is None
    assert "with a background" in (alpha_note(hole) or "")


@pytest.mark.parametrize("size", [(4, 4), (40, 700), (700, 40)])
@pytest.mark.parametrize(("alpha", "noted"), [(255, True), (128, False)])
def test_a_frame_counts_at_any_size(alpha: int, noted: bool, size: tuple[int, int]) -> None:
    picture = Image.new("RGBA", size, (0, 0, 0, alpha))
    picture.paste((0, 0, 0, 0), (size[0] // 4, size[1] // 4, size[0] - size[0] // 4, size[1] - size[1] // 4))
    assert bool(alpha_note(picture)) is noted
