"""img2img keeps alpha: any picture to start from, any batch, any way to resize."""

import subprocess
from pathlib import Path

import pytest
from PIL import Image, ImageChops, ImageDraw

from tests.forge import data
from tests.forge.client import (
    SD15_ATTENTION,
    SD15_JOINT,
    SDXL_ATTENTION,
    all_different,
    alpha_varies,
    layerdiffuse,
    merged,
    opened,
    same,
    to_base64,
)
from tests.forge.hosts import needs
from tests.forge.test_inpainting import looks_over_grey_like

REFERENCE = Path(__file__).resolve().parent / "reference_roundtrip.py"
SMALL = {"width": 64, "height": 64, "steps": 2, "denoising_strength": 0.5}
TRANSPARENT = merged(layerdiffuse(SD15_ATTENTION), SMALL)
COLOURS = ((220, 40, 40), (40, 220, 40), (40, 40, 220))


def disc(mode="RGBA", size=(64, 64), colour=COLOURS[0]):
    """A disc, on nothing where the mode has an alpha."""
    image = Image.new("RGBA", size)
    ImageDraw.Draw(image).ellipse((size[0] // 4, size[1] // 4, 3 * size[0] // 4, 3 * size[1] // 4), (*colour, 255))
    return image.convert(mode)


def on_grey(image):
    return Image.alpha_composite(Image.new("RGBA", image.size, (127, 127, 127, 255)), image)


def soft_disc():
    """A disc whose alpha falls off from its middle, with another colour under what is transparent."""
    alpha = ImageChops.invert(Image.radial_gradient("L").resize((64, 64)))
    image = Image.merge("RGB", (alpha, Image.linear_gradient("L").resize((64, 64)), ImageChops.invert(alpha)))
    image.putalpha(alpha)
    return image


@pytest.mark.parametrize(
    "mode",
    ["RGBA", "RGB", "LA", pytest.param("L", marks=pytest.mark.full), pytest.param("P", marks=pytest.mark.full)],
)
def test_a_picture_of_any_mode(forge, mode):
    answer = forge.img2img(disc().convert(mode), TRANSPARENT)
    assert answer.status == 200, answer.body
    assert [image.mode for image in answer.images] == ["RGBA", "RGB"]
    assert alpha_varies(answer.images[0])


def test_there_and_back_without_a_change_is_what_the_networks_say(forge, installation, tmp_path):
    """Without a step of sampling, what comes out is decode(encode(x)), compared bit for bit."""
    given, expected = tmp_path / "given.png", tmp_path / "expected.png"
    soft_disc().save(given)
    layers = [data.layer_file(f"layer_sd15_vae_transparent_{kind}") for kind in ("encoder", "decoder")]
    checkpoint = data.models() / "Stable-diffusion" / data.CHECKPOINTS["sd15"]
    subprocess.run([installation.python, REFERENCE, checkpoint, *layers, given, expected], check=True)
    standstill = {"alwayson_scripts": {"LayerDiffuse test standstill": {"args": [True]}}}
    answer = forge.img2img(soft_disc(), TRANSPARENT, standstill)
    assert answer.status == 200, answer.body
    assert alpha_varies(answer.images[0])
    difference = ImageChops.difference(answer.images[0], Image.open(expected))
    assert max(high for _, high in difference.getextrema()) <= 1, difference.getextrema()


def test_every_picture_of_a_batch_starts_from_its_own(forge):
    inits = [disc(colour=colour) for colour in COLOURS]
    batch = forge.img2img(inits[0], TRANSPARENT, init_images=list(map(to_base64, inits)), batch_size=3)
    assert batch.status == 200, batch.body
    assert len(batch.transparent) == 3 and all_different(batch.transparent)
    repeated = forge.img2img(inits[0], TRANSPARENT, init_images=[to_base64(inits[0])] * 3, batch_size=3)
    assert same(batch.transparent[0], repeated.transparent[0])
    assert not same(batch.transparent[1], repeated.transparent[1])
    assert not same(batch.transparent[2], repeated.transparent[2])


@pytest.mark.parametrize("mode", [0, 1, pytest.param(2, marks=pytest.mark.full), 3])
def test_ways_to_resize(forge, mode):
    picture = disc(size=(200, 136))
    answer = forge.img2img(picture, TRANSPARENT, resize_mode=mode)
    assert answer.status == 200, answer.body
    assert answer.images[0].size == (64, 64) and alpha_varies(answer.images[0])
    by_hand = picture.convert("RGBa").resize((64, 64), Image.Resampling.LANCZOS).convert("RGBA")
    stretched = forge.img2img(by_hand, TRANSPARENT)
    assert same(answer.images[0], stretched.images[0]) == (mode == 0)


@needs("any size")
def test_a_size_that_8_does_not_divide(forge):
    """As in txt2img: the last pixels that fill no cell of the latent are left out. ersatz fills the cell."""
    answers = forge.img2img(disc(), TRANSPARENT, width=67, height=100), forge.txt2img(TRANSPARENT, width=67, height=100)
    assert [answer.images[0].size for answer in answers] in ([(64, 96)] * 2, [(64, 104)] * 2)
    assert alpha_varies(answers[0].images[0])


def test_colour_correction_is_for_colours_over_grey(forge):
    before = forge.img2img(soft_disc(), TRANSPARENT)
    with forge.options(img2img_color_correction=True):
        after = forge.img2img(soft_disc(), TRANSPARENT)
    assert not same(after.images[1], before.images[1])
    assert same(after.images[0].getchannel("A"), before.images[0].getchannel("A"))
    assert looks_over_grey_like(after.images[0], after.images[1], Image.new("L", (64, 64), 255))


@needs("transparent extras")
def test_extras_that_crop_keep_alpha(forge):
    how = {"resize_mode": 1, "upscaler_1": "Lanczos", "upscaling_resize_w": 100, "upscaling_resize_h": 80}

    def enlarged(picture, crop, **more):
        body = {**how, "upscaling_crop": crop, "image": to_base64(picture), **more}
        return opened(forge.request("sdapi/v1/extra-single-image", body).body["image"])

    whole, cropped = (enlarged(soft_disc(), crop) for crop in (False, True))
    expected = Image.new("RGBA", (100, 80))
    expected.paste(whole, (50 - whole.width // 2, 40 - whole.height // 2))
    assert same(cropped, expected)
    assert enlarged(soft_disc().convert("RGB"), True).mode == "RGB"
    by_factor = enlarged(soft_disc(), True, resize_mode=0, upscaling_resize=2)
    assert (by_factor.mode, by_factor.size) == ("RGBA", tuple(2 * side for side in soft_disc().size))


@pytest.mark.full
@needs("any size")
def test_a_size_that_64_does_not_divide(forge):
    answer = forge.img2img(disc(), TRANSPARENT, width=328, height=520)
    assert answer.status == 200, answer.body
    assert answer.images[0].size == (328, 520) and alpha_varies(answer.images[0])


@pytest.mark.full
def test_tiled_vae_keeps_alpha(forge):
    """At a size that Forge's tiles can do. The last job switches them off again, which else stay."""
    size = {"width": 256, "height": 256, "steps": 1}
    tiled, untiled = ({"alwayson_scripts": {"Never OOM Integrated": {"args": [False, on]}}} for on in (True, False))
    opaque = on_grey(disc(size=(256, 256)))
    jobs = ((disc(size=(256, 256)), tiled), (opaque, tiled), (disc(size=(256, 256)), untiled))
    answers = [forge.img2img(init, TRANSPARENT, size, how) for init, how in jobs]
    assert all_different([answer.images[0] for answer in answers])


@pytest.mark.sdxl
def test_sdxl(forge):
    answers = [forge.img2img(init, layerdiffuse(SDXL_ATTENTION), SMALL) for init in (disc(), on_grey(disc()))]
    assert all(alpha_varies(answer.images[0]) for answer in answers)
    assert all_different([answer.images[0] for answer in answers])


def test_layers_start_from_one_picture(forge):
    answer = forge.img2img(disc(), layerdiffuse(SD15_JOINT), SMALL)
    assert answer.status == 200, answer.body
    assert [image.mode for image in answer.images] == ["RGBA", "RGB", "RGB", "RGB"]


def test_loopback_goes_on_with_the_transparent_picture(forge):
    """The second loop is the same job as one that starts from the first loop's picture."""
    script = forge.script("loopback", {"Loops": 2, "Final denoising strength": 0.5}, is_img2img=True)
    answer = forge.img2img(disc(), TRANSPARENT, script)
    assert answer.status == 200, answer.body
    first, second = answer.transparent
    assert same(forge.img2img(first, TRANSPARENT, seed=2).images[0], second)
