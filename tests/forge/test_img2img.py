"""img2img: an opaque picture to start from works; what is not built yet is refused."""

import pytest
from PIL import Image, ImageDraw

from tests.forge.client import SD15_ATTENTION, alpha_varies, layerdiffuse, to_base64


def disc(mode, size=(128, 128)):
    """A red disc, on nothing where the mode has an alpha."""
    image = Image.new("RGBA", size)
    ImageDraw.Draw(image).ellipse((size[0] // 4, size[1] // 4, 3 * size[0] // 4, 3 * size[1] // 4), (220, 40, 40, 255))
    return image.convert(mode)


@pytest.mark.parametrize(
    "mode", ["RGB", pytest.param("L", marks=pytest.mark.full), pytest.param("P", marks=pytest.mark.full)]
)
def test_an_opaque_picture(forge, mode):
    answer = forge.img2img(disc("RGB").convert(mode), layerdiffuse(SD15_ATTENTION))
    assert answer.status == 200, answer.body
    assert [image.mode for image in answer.images] == ["RGBA", "RGB"]
    assert alpha_varies(answer.images[0])


@pytest.mark.full
def test_an_alpha_channel_without_transparency_is_an_opaque_picture(forge):
    answer = forge.img2img(Image.new("RGBA", (128, 128), (200, 40, 40, 255)), layerdiffuse(SD15_ATTENTION))
    assert answer.status == 200, answer.body
    assert alpha_varies(answer.images[0])


@pytest.mark.full
def test_another_size(forge):
    answer = forge.img2img(disc("RGB", (200, 136)), layerdiffuse(SD15_ATTENTION))
    assert answer.status == 200, answer.body
    assert answer.images[0].size == (128, 128) and alpha_varies(answer.images[0])


def test_a_transparent_picture_is_refused(forge):
    assert "transparen" in forge.img2img(disc("RGBA"), layerdiffuse(SD15_ATTENTION)).refusal.lower()


def test_a_mask_is_refused(forge):
    mask = to_base64(disc("RGBA").getchannel("A"))
    answer = forge.img2img(disc("RGB"), layerdiffuse(SD15_ATTENTION), mask=mask)
    refusal = answer.refusal.lower()
    assert "mask" in refusal or "inpaint" in refusal
