"""What a job gives back: transparent pictures first, of the asked size, then the opaque ones."""

import pytest

from tests.forge.client import (
    PNG_SIGNATURE,
    SD15_ATTENTION,
    SDXL_ATTENTION,
    SDXL_CONV,
    all_different,
    alpha_varies,
    layerdiffuse,
    layerdiffuse_arguments,
    same,
)
from tests.forge.hosts import LATENT_UPSCALER, needs

METHODS = (
    SD15_ATTENTION,
    pytest.param(SDXL_ATTENTION, marks=pytest.mark.sdxl),
    pytest.param(SDXL_CONV, marks=pytest.mark.sdxl),
)
HIRES = {
    "enable_hr": True,
    "hr_scale": 1.5,
    "denoising_strength": 0.7,
    "hr_cfg": 7,
    "hr_additional_modules": ["Use same choices"],
}
# What the extension logs when it reads a weights file, and when the host merges one into the model.
READING, MERGING = "read layer_", "merging layer_"
SIZES = (
    (520, 328),
    (136, 136),
    pytest.param((96, 96), marks=pytest.mark.full),
    pytest.param((160, 128), marks=pytest.mark.full),
    pytest.param((32, 32), marks=pytest.mark.full),
)


def assert_rgba_then_opaque(answer, size, count=1):
    assert answer.status == 200, answer.body
    modes = [image.mode for image in answer.images]
    assert modes == ["RGBA"] * count + ["RGB"] * count
    assert {image.size for image in answer.images} == {size}
    assert all(alpha_varies(image) for image in answer.images[:count])


@pytest.mark.parametrize("method", METHODS)
def test_a_transparent_picture_and_then_the_opaque_one(forge, method):
    answer = forge.txt2img(layerdiffuse(method))
    assert_rgba_then_opaque(answer, (128, 128))
    assert all(data.startswith(PNG_SIGNATURE) for data in answer.files)


@needs("any size")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_any_size_that_the_page_offers(forge, size):
    width, height = size
    assert_rgba_then_opaque(forge.txt2img(layerdiffuse(SD15_ATTENTION), width=width, height=height), size)


def test_batches_come_as_six_pictures_then_the_grid_then_the_opaque_ones(forge):
    with forge.options(return_grid=True):
        answer = forge.txt2img(
            layerdiffuse(SD15_ATTENTION), batch_size=3, n_iter=2, width=64, height=64, save_images=True
        )
    assert answer.status == 200, answer.body
    pictures, rest = answer.images[:6], answer.images[6:]
    assert all(alpha_varies(image) and image.size == (64, 64) for image in pictures)
    assert all_different(pictures)
    grid, opaque = rest[0], rest[1:]
    assert grid.width * grid.height >= 6 * 64 * 64
    assert [(image.mode, image.size) for image in opaque] == [("RGB", (64, 64))] * 6
    assert all_different(opaque)


@pytest.mark.parametrize("upscaler", [pytest.param(LATENT_UPSCALER, marks=needs("latent upscalers")), "Lanczos"])
def test_hires_fix(forge, upscaler):
    answer = forge.txt2img(layerdiffuse(SD15_ATTENTION), HIRES, hr_upscaler=upscaler)
    assert_rgba_then_opaque(answer, (192, 192))


@pytest.mark.full
@pytest.mark.sdxl
@needs("latent upscalers")
def test_hires_fix_sdxl(forge):
    answer = forge.txt2img(layerdiffuse(SDXL_ATTENTION), HIRES, hr_upscaler=LATENT_UPSCALER)
    assert_rgba_then_opaque(answer, (192, 192))


def test_the_second_picture_reads_no_weights(forge):
    first = forge.txt2img(layerdiffuse(SD15_ATTENTION))
    mark = forge.mark()
    second = forge.txt2img(layerdiffuse(SD15_ATTENTION))
    assert same(first.images[0], second.images[0])
    assert READING in forge.server.text(), "reading is not logged, so its absence says nothing"
    assert READING not in forge.logged_since(mark)


@pytest.mark.sdxl
def test_the_second_sdxl_picture_reads_and_merges_nothing(forge):
    first = forge.picture(layerdiffuse(SDXL_ATTENTION))
    mark = forge.mark()
    assert same(first, forge.picture(layerdiffuse(SDXL_ATTENTION)))
    assert MERGING in forge.server.text(), "merging is not logged, so its absence says nothing"
    assert READING not in forge.logged_since(mark)
    assert MERGING not in forge.logged_since(mark)


@pytest.mark.full
@pytest.mark.sdxl
def test_sd15_after_sdxl_is_what_it_was_before(forge):
    """Nothing of one family is used for the other."""
    sdxl = forge.txt2img(layerdiffuse(SDXL_ATTENTION))
    pictures = []
    for _ in range(2):
        forge.use("sd15")
        pictures.append(forge.picture(layerdiffuse(SD15_ATTENTION)))
        forge.use("sdxl")
        again = forge.txt2img(layerdiffuse(SDXL_ATTENTION))
        assert same(again.images[0], sdxl.images[0])
    assert same(*pictures)


def test_infotext_is_read_back(forge):
    answer = forge.txt2img(layerdiffuse(SD15_ATTENTION, weight=0.75))
    mark = forge.mark()
    read = forge.request("sdapi/v1/png-info", {"image": answer.body["images"][0]})
    assert "LayerDiffuse" in answer.infotexts[0]
    assert read.body["info"] == answer.infotexts[0]
    assert any("LayerDiffuse" in key for key in read.body["parameters"]), read.body["parameters"]
    assert "Error parsing" not in forge.logged_since(mark)


def test_passes_of_a_request_go_before_those_of_the_settings(forge):
    asked = forge.txt2img(layerdiffuse_arguments({"method": SD15_ATTENTION, "passes": 2}))
    with forge.options(layerdiffuse_passes=2):
        set_so = forge.txt2img(layerdiffuse(SD15_ATTENTION))
    assert "LayerDiffuse passes: 2" in asked.infotexts[0]
    assert asked.infotexts == set_so.infotexts
    assert same(asked.images[0], set_so.images[0])
    assert not same(asked.images[0], forge.picture(layerdiffuse(SD15_ATTENTION)))


def test_grey_background_is_sampled_with_and_not_recorded_as_prompt(forge):
    asked = forge.txt2img(layerdiffuse_arguments({"method": SD15_ATTENTION, "grey_background": True}))
    typed = forge.txt2img(layerdiffuse(SD15_ATTENTION), prompt="plain grey background, apple")
    assert same(asked.images[0], typed.images[0])
    assert asked.infotexts[0].startswith("apple\n") and "LayerDiffuse grey background: True" in asked.infotexts[0]


def test_a_request_with_an_infotext_has_its_settings(forge):
    first = forge.txt2img(layerdiffuse_arguments({"method": SD15_ATTENTION, "weight": 0.6, "passes": 2}))
    # Forge cannot take lists from an infotext (modules/api/api.py:407), and so wants them in the request.
    body = {"infotext": first.infotexts[0], "hr_additional_modules": ["Use same choices"], "styles": []}
    again = forge.request("sdapi/v1/txt2img", body)
    assert again.status == 200, again.body
    assert same(again.images[0], first.images[0])
