"""Inpainting keeps alpha: outside the mask nothing changes, inside the decoder says what is there."""

import pytest
from PIL import Image, ImageChops, ImageDraw

from tests.forge.client import SD15_ATTENTION, SD15_JOINT, alpha_varies, layerdiffuse, merged, same, to_base64
from tests.forge.hosts import needs

QUICK = {"steps": 2, "denoising_strength": 0.6}
INPAINT = merged(layerdiffuse(SD15_ATTENTION), QUICK)
WHOLE, ONLY_MASKED = {"inpaint_full_res": False}, {"inpaint_full_res": True, "inpaint_full_res_padding": 8}
ORIGINAL = 1
HIDDEN = (10, 200, 30, 0)


def cut_out(size=(128, 128)):
    """A red disc on nothing, under which another colour is hidden."""
    image = Image.new("RGBA", size, HIDDEN)
    ImageDraw.Draw(image).ellipse((size[0] // 4, size[1] // 4, 3 * size[0] // 4, 3 * size[1] // 4), (220, 40, 40, 255))
    return image


def mask(size=(128, 128), box=(0.5, 0.25, 0.9, 0.75)):
    """White where the picture is painted over. box: in parts of the size."""
    image = Image.new("L", size)
    left, upper, right, lower = (round(part * side) for part, side in zip(box, size * 2))
    ImageDraw.Draw(image).rectangle((left, upper, right - 1, lower - 1), 255)
    return image


def inpainted(forge, picture, white, *fields, **more):
    request = {"mask": to_base64(white), "mask_blur": 0, "inpainting_fill": ORIGINAL} | more
    answer = forge.img2img(picture, INPAINT, *fields, **request)
    assert answer.status == 200, answer.body
    return answer


def equal_where(first, second, white):
    """The part of the white pixels where two pictures are the same, bit for bit."""
    pixels = zip(*(image.tobytes() for image in (*first.split(), *second.split(), white)), strict=True)
    count = len(first.getbands())
    equal = [pixel[:count] == pixel[count:-1] for pixel in pixels if pixel[-1]]
    return sum(equal) / len(equal)


def looks_over_grey_like(picture, shown, white):
    """Whether an RGBA picture over the middle grey is what is shown, or as near as its alpha allows."""
    pixels = zip(*(image.tobytes() for image in (*picture.split(), *shown.split(), white)), strict=True)
    for *straight, alpha, red, green, blue, counts in pixels:
        grey = 127.5 * (1 - alpha / 255)
        for value, wanted in zip(straight, (red, green, blue)):
            nearest = min(max(wanted, grey), grey + alpha)
            if counts and abs(value * alpha / 255 + grey - nearest) > 1:
                return False
    return True


full = pytest.mark.full


@pytest.mark.parametrize(
    ("area", "fill"),
    [
        (WHOLE, 0),
        (WHOLE, ORIGINAL),
        (WHOLE, 2),
        (WHOLE, 3),
        pytest.param(ONLY_MASKED, 0, marks=full),
        (ONLY_MASKED, ORIGINAL),
        pytest.param(ONLY_MASKED, 2, marks=full),
        pytest.param(ONLY_MASKED, 3, marks=full),
    ],
)
def test_outside_the_mask_nothing_changes(forge, area, fill):
    size = (128, 128) if area is WHOLE else (200, 144)
    picture, white = cut_out(size), mask(size)
    answer = inpainted(forge, picture, white, area, inpainting_fill=fill)
    result = answer.images[0]
    assert (result.mode, result.size) == ("RGBA", size)
    assert equal_where(result, picture, ImageChops.invert(white)) == 1
    assert equal_where(result, picture, white) < 0.05


@needs("any size")
@pytest.mark.parametrize("area", [pytest.param(WHOLE, marks=full), ONLY_MASKED])
def test_any_size(forge, area):
    picture, white = cut_out((328, 520)), mask((328, 520))
    result = inpainted(forge, picture, white, area, width=328, height=520).images[0]
    assert result.size == (328, 520)
    assert equal_where(result, picture, ImageChops.invert(white)) == 1
    assert equal_where(result, picture, white) < 0.05


def test_a_blurred_mask_has_a_soft_seam(forge):
    """Where the mask is blurred to between black and white, the result lies between picture and decoder."""
    picture, white = cut_out(), mask()
    sharp, soft = (inpainted(forge, picture, white, WHOLE, mask_blur=blur).images[0] for blur in (0, 8))
    far = Image.new("L", picture.size, 255)
    far.paste(0, (128 // 2 - 24, 128 // 4 - 24, 128, 3 * 128 // 4 + 24))
    assert equal_where(soft, picture, far) == 1
    beside = mask(box=(0.5 - 4 / 128, 0.3, 0.5, 0.7))
    assert equal_where(sharp, picture, beside) == 1
    assert equal_where(soft, picture, beside) < 0.5


def test_beside_a_cut_out(forge):
    """Something is added where there was nothing: it has alpha, and the subject stays."""
    picture, white = cut_out(), mask(box=(0.8, 0, 1, 1))
    result = inpainted(forge, picture, white, WHOLE, inpainting_fill=2).images[0]
    assert max(result.getchannel("A").crop((104, 0, 128, 128)).getextrema()) > 0
    assert same(result.crop((0, 0, 102, 128)), picture.crop((0, 0, 102, 128)))


def test_white_of_half_opacity_is_half_a_mask(forge):
    """Forge alone takes the alpha of such a mask: all of the picture but the white part."""
    picture, white = cut_out(), mask()
    grey, alpha = (white.point(lambda value, there=there: 128 if value else there) for there in (0, 255))
    soft = Image.merge("RGBA", [white, white, white, alpha])
    first, second = (inpainted(forge, picture, each, ONLY_MASKED).images[0] for each in (soft, grey))
    assert same(first, second)
    assert equal_where(first, picture, ImageChops.invert(white)) == 1
    assert equal_where(first, picture, white) < 0.05


def test_inverted_mask(forge):
    picture, white = cut_out(), mask()
    straight = inpainted(forge, picture, white, WHOLE).images[0]
    inverted = inpainted(forge, picture, ImageChops.invert(white), WHOLE, inpainting_mask_invert=1).images[0]
    assert same(straight, inverted)


@full
def test_a_batch_of_inpaintings(forge):
    inits = [cut_out(), ImageChops.offset(cut_out(), 20, 0)]
    answer = inpainted(forge, inits[0], mask(), WHOLE, init_images=list(map(to_base64, inits)), batch_size=2)
    for result, picture in zip(answer.transparent, inits, strict=True):
        assert equal_where(result, picture, ImageChops.invert(mask())) == 1
        assert equal_where(result, picture, mask()) < 0.05


@full
def test_layers(forge):
    answer = inpainted(forge, cut_out(), mask(), WHOLE, layerdiffuse(SD15_JOINT))
    assert [image.mode for image in answer.images] == ["RGBA", "RGB", "RGB", "RGB"]
    assert equal_where(answer.images[0], cut_out(), ImageChops.invert(mask())) == 1


def test_soft_inpainting(forge):
    """The host's script decides by what changed in the latents how much of the original it lays over."""
    soft = {"alwayson_scripts": {"Soft Inpainting": {"args": [True, 1, 0.5, 4, 0, 0.5, 2]}}}
    answer = inpainted(forge, cut_out(), mask(), WHOLE, soft, mask_blur=8)
    assert answer.images[0].mode == "RGBA"
    assert equal_where(answer.images[0], cut_out(), mask(box=(0, 0, 0.2, 1))) == 1


def test_without_the_hosts_overlay_all_of_it_is_the_decoder_s(forge):
    with forge.options(overlay_inpaint=False):
        result = inpainted(forge, cut_out(), mask(), WHOLE).images[0]
    assert alpha_varies(result)
    assert equal_where(result, cut_out(), ImageChops.invert(mask())) < 0.5
