"""Differential Diffusion in the host: where the map is white the picture changes, where it is black it stays."""

import re

import pytest
from PIL import Image, ImageChops

from tests.forge.client import SD15_ATTENTION, alpha_varies, differential, layerdiffuse, merged, same, to_base64
from tests.forge.test_inpainting import cut_out, equal_where, mask

SIZE = (64, 64)
STEPS = 8
JOB = {"width": 64, "height": 64, "steps": STEPS, "denoising_strength": 1.0}
TRANSPARENT = merged(layerdiffuse(SD15_ATTENTION), JOB)
FEW = {"steps": 4}
full = pytest.mark.full


def painting():
    return Image.merge("RGB", [Image.linear_gradient("L").rotate(90 * turns).resize(SIZE) for turns in range(3)])


def ramp():
    """From black on the left to white on the right."""
    return Image.linear_gradient("L").rotate(90).resize(SIZE)


def uploaded(change):
    return differential({"map_image": to_base64(change)})


def latent(forge, *fields, **more):
    with forge.probed() as latents:
        answer = forge.img2img(painting(), JOB, *fields, **more)
    assert answer.status == 200, answer.body
    return latents[0]["values"]


def distance(first, second):
    """Relative to the second."""
    norm = sum(value**2 for value in second) ** 0.5
    return sum((a - b) ** 2 for a, b in zip(first, second, strict=True)) ** 0.5 / norm


def mean_vae():
    """Forge samples the posterior of its VAE at random; with LayerDiffuse the start is the same each time."""
    return layerdiffuse(SD15_ATTENTION)


@full
@pytest.mark.parametrize("exact_steps", [False, True])
def test_one_value_all_over_is_img2img_at_that_strength(forge, exact_steps):
    """Half of the steps ahead, reached from above; Forge's own half has a step more than its number says."""
    grey = Image.new("L", SIZE, 128)
    with forge.options(img2img_fix_steps=exact_steps):
        by_map = latent(forge, mean_vae(), uploaded(grey))
    plain = latent(forge, mean_vae(), denoising_strength=(STEPS / 2 - 1) / STEPS + 0.01)
    full_strength = latent(forge, mean_vae())
    assert distance(by_map, plain) < 1e-4
    assert distance(full_strength, plain) > 1e-2


def test_white_all_over_is_img2img(forge):
    white = Image.new("L", SIZE, 255)
    assert distance(latent(forge, mean_vae(), uploaded(white), FEW), latent(forge, mean_vae(), FEW)) < 1e-4


@pytest.mark.full
def test_a_ramp_changes_more_and_more(forge):
    answer = forge.img2img(cut_out(SIZE), TRANSPARENT, uploaded(ramp()))
    assert answer.status == 200, answer.body
    result = answer.images[0]
    assert alpha_varies(result)
    difference = ImageChops.difference(answer.images[1], forge.img2img(cut_out(SIZE), TRANSPARENT).images[1])
    thirds = [difference.crop((left, 0, left + 21, 64)).convert("L") for left in (0, 21, 42)]
    means = [sum(third.tobytes()) / (21 * 64) for third in thirds]
    assert means[0] > means[1] > means[2], f"the further right, the more like a picture that is free to change: {means}"


@pytest.mark.parametrize(
    "sampler",
    ["DDIM", "Heun", pytest.param("DPM++ 2M SDE", marks=full), pytest.param("DPM2 a", marks=full),
     pytest.param("UniPC", marks=full), pytest.param("DPM++ 3M SDE", marks=full), pytest.param("PLMS", marks=full),
     pytest.param("DPM adaptive", marks=full), pytest.param("LCM", marks=full), pytest.param("Restart", marks=full)],
)  # fmt: skip
def test_black_stays_with_any_sampler(forge, sampler):
    half = Image.new("L", SIZE)
    half.paste(255, (32, 0, 64, 64))
    answer = forge.img2img(cut_out(SIZE), TRANSPARENT, uploaded(half), FEW, sampler_name=sampler)
    assert answer.status == 200, answer.body
    assert equal_where(answer.images[0], cut_out(SIZE), ImageChops.invert(half)) == 1
    assert equal_where(answer.images[0], cut_out(SIZE), half) < 0.1


@pytest.mark.parametrize(
    ("source", "changed", "kept"),
    [
        ("Alpha: edges", (16, 32), (32, 32)),
        pytest.param("Alpha: inside", (32, 32), (2, 2), marks=full),
        pytest.param("Alpha: outside", (2, 2), (32, 32), marks=full),
    ],
)
def test_a_map_from_alpha(forge, source, changed, kept):
    answer = forge.img2img(cut_out(SIZE), TRANSPARENT, differential({"source": source, "softness": 6}), FEW)
    assert answer.status == 200, answer.body
    result, picture = answer.images[0], cut_out(SIZE)
    assert result.getpixel(kept) == picture.getpixel(kept)
    assert result.getpixel(changed) != picture.getpixel(changed)
    assert source in answer.infotexts[0] and "Differential Diffusion softness: 6" in answer.infotexts[0]


@pytest.mark.parametrize("area", [False, pytest.param(True, marks=full)])
def test_the_inpaint_mask_softened(forge, area):
    picture, white = cut_out((128, 128)), mask((128, 128))
    soft = differential({"source": "Inpaint mask", "softness": 12})
    answer = forge.img2img(
        picture, TRANSPARENT, soft, FEW, mask=to_base64(white), inpaint_full_res=area, inpainting_fill=1,
        width=128, height=128,
    )  # fmt: skip
    assert answer.status == 200, answer.body
    assert equal_where(answer.images[0], picture, mask(box=(0, 0, 0.25, 1))) == 1
    assert equal_where(answer.images[0], picture, white) < 0.05


def test_a_strength_fan_shows_the_strengths(forge):
    """Without LayerDiffuse, on an opaque picture."""
    fan = differential({"source": "Strength fan", "columns": 4})
    before = forge.saved_files()
    answer = forge.img2img(painting(), JOB, fan, denoising_strength=0.8, save_images=True)
    assert answer.status == 200, answer.body
    result, labelled = (image.convert("RGB") for image in answer.images)  # Forge hides its infotext in an alpha
    assert result.size == SIZE and labelled.width == 64 and labelled.height > 64
    assert same(labelled.crop((0, 0, *SIZE)), result)
    columns = [ImageChops.difference(result, painting()).crop((left, 0, left + 16, 64)) for left in (0, 16, 32, 48)]
    means = [sum(column.convert("L").tobytes()) for column in columns]
    assert means[0] < means[3], means
    assert any("strengths" in path.stem for path in forge.saved_files() - before)


@full
def test_an_inpainting_checkpoint_gets_the_mask_of_each_step(forge):
    """Half of the picture may change from the start, the other half from the middle of the steps on."""
    forge.use("sd15_inpaint")
    half = Image.new("L", SIZE, 128)
    half.paste(255, (0, 0, 32, 64))
    watched = {"alwayson_scripts": {"LayerDiffuse test inpainting": {"args": [True]}}}
    mark = forge.mark()
    answer = forge.img2img(painting(), JOB, uploaded(half), watched)
    assert answer.status == 200, answer.body
    masked = re.findall(r"masked: ([\d.]+)", forge.logged_since(mark))
    assert masked == ["0.500"] * (STEPS // 2) + ["1.000"] * (STEPS // 2)


@full
def test_each_picture_of_a_batch_has_its_own_map(forge):
    inits = [cut_out(SIZE), ImageChops.offset(cut_out(SIZE), 12, 0)]
    edges = differential({"source": "Alpha: edges", "softness": 4})
    answer = forge.img2img(
        inits[0], TRANSPARENT, edges, FEW, init_images=list(map(to_base64, inits)), batch_size=2
    )  # fmt: skip
    assert answer.status == 200, answer.body
    for result, picture, middle in zip(answer.transparent, inits, ((32, 32), (44, 32)), strict=True):
        assert result.getpixel(middle) == picture.getpixel(middle)
        assert result.getpixel((middle[0] - 16, 32)) != picture.getpixel((middle[0] - 16, 32))


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({}, "no change map"),
        ({"source": "Inpaint mask"}, "mask"),
        ({"source": "Alpha: edges"}, "transparency"),
        ({"source": "Alpha"}, "Alpha: edges"),
        ({"map_image": to_base64(Image.new("L", SIZE))}, "black"),
    ],
)
def test_what_cannot_work_is_refused_and_the_next_job_runs(forge, names, words):
    assert words in forge.img2img(painting(), JOB, differential(names)).refusal


def test_a_job_after_a_map_is_an_ordinary_one(forge):
    before = latent(forge, mean_vae(), FEW)
    latent(forge, mean_vae(), uploaded(ramp()), FEW)
    assert latent(forge, mean_vae(), FEW) == before


def test_latent_resize_and_a_map_do_not_go_together(forge):
    assert "resize" in forge.img2img(painting(), JOB, uploaded(ramp()), resize_mode=3).refusal
