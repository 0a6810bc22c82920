"""Together with what else changes the UNet, the prompt or the sampler."""

import pytest
from PIL import Image, ImageChops

from tests.forge.client import SD15_ATTENTION, SD15_FG_TO_BG, alpha_varies, layerdiffuse, same, to_base64
from tests.forge.hosts import needs
from tests.forge.test_inpainting import cut_out, equal_where, looks_over_grey_like, mask

SMALL = {"width": 64, "height": 64, "steps": 2}
LORA = {"prompt": "apple <lora:synthetic_lora_sd15:1>"}
SELF, PERTURBED = "SelfAttentionGuidance Integrated (SD 1.x, SD 2.x, SDXL)", "PerturbedAttentionGuidance Integrated"
GUIDANCE = {SELF: [True, 0.5, 2.0, 1.0], PERTURBED: [True, 3.0, 0.0, 0.0, 1.0]}
WAYS = {
    "cfg 1": {"cfg_scale": 1},
    "and": {"prompt": "apple AND pear"},
    "prompt editing": {"prompt": "[apple:pear:1]"},
    "emphasis": {"prompt": "(apple:1.3)"},
    "more than 75 tokens": {"prompt": "apple " * 90},
    "negative prompt": {"negative_prompt": "blurry " * 90},
    "DDIM": {"sampler_name": "DDIM"},
    "DPM++ 2M Karras": {"sampler_name": "DPM++ 2M", "scheduler": "Karras"},
    "Euler a": {"sampler_name": "Euler a"},
}
QUICK = ("cfg 1", "and", "more than 75 tokens")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.full) for name in WAYS]
)
def test_ways_to_prompt_and_to_sample(forge, name):
    answer = forge.txt2img(layerdiffuse(SD15_ATTENTION), SMALL, WAYS[name])
    assert answer.status == 200, answer.body
    assert alpha_varies(answer.images[0])


@pytest.mark.parametrize("script", [pytest.param(SELF, marks=pytest.mark.full), PERTURBED])
def test_guidance_that_looks_into_the_attention(forge, script):
    """Works, or is refused with a sentence where it would take the same layers."""
    alone, both = layerdiffuse(SD15_ATTENTION), layerdiffuse(SD15_ATTENTION)
    both["alwayson_scripts"][script] = {"args": GUIDANCE[script]}
    before = forge.picture(alone, steps=3)
    answer = forge.txt2img(both, steps=3)
    if answer.status == 422:
        assert "attention" in answer.refusal
    else:
        assert answer.status == 200, answer.body
        assert alpha_varies(answer.images[0]) and not same(answer.images[0], before)
    assert same(forge.picture(alone, steps=3), before)


def test_token_merging(forge):
    with forge.options(token_merging_ratio=0.5):
        merged = forge.picture(layerdiffuse(SD15_ATTENTION))
    assert alpha_varies(merged)
    assert not same(merged, forge.picture(layerdiffuse(SD15_ATTENTION)))


@needs("user LoRAs")
def test_a_users_lora_counts_in_the_layers_too(forge):
    """In the order that breaks the existing extension: LoRA and LayerDiffuse together first, then each alone."""
    plain, alone = forge.picture(), forge.picture(layerdiffuse(SD15_ATTENTION))
    both = forge.picture(layerdiffuse(SD15_ATTENTION), LORA)
    assert alpha_varies(both) and not same(both, alone)
    assert same(forge.picture(), plain)
    assert same(forge.picture(layerdiffuse(SD15_ATTENTION)), alone)
    assert not same(forge.picture(LORA), plain)
    assert same(forge.picture(layerdiffuse(SD15_ATTENTION), LORA), both)
    assert same(forge.picture(), plain)


DETAILER = {"alwayson_scripts": {"LayerDiffuse test detailer": {"args": [True]}}}


def test_a_detailer_s_edit_is_kept_and_so_is_the_alpha(forge):
    before = forge.txt2img(layerdiffuse(SD15_ATTENTION), SMALL)
    after = forge.txt2img(layerdiffuse(SD15_ATTENTION), SMALL, DETAILER)
    assert after.status == 200, after.body
    assert same(before.images[0].getchannel("A"), after.images[0].getchannel("A"))
    middle = Image.new("L", (64, 64))
    middle.paste(255, (16, 16, 48, 48))
    outside = ImageChops.invert(middle)
    painted = [answer.images[1].convert("RGBA") for answer in (before, after)]
    assert equal_where(*painted, outside) == 1 and equal_where(*painted, middle) < 0.1
    assert equal_where(before.images[0], after.images[0], outside) == 1
    inner = Image.new("L", (64, 64))
    inner.paste(255, (20, 20, 44, 44))
    assert looks_over_grey_like(after.images[0], after.images[1], inner)


@pytest.mark.full
def test_a_detailer_in_inpainting(forge):
    """What it changes outside the mask does not count, inside its colour does."""
    picture, white = cut_out((64, 64)), mask((64, 64))
    request = {"mask": to_base64(white), "mask_blur": 0, "inpainting_fill": 1, "inpaint_full_res": False}
    answer = forge.img2img(picture, layerdiffuse(SD15_ATTENTION), SMALL, DETAILER, request)
    assert answer.status == 200, answer.body
    assert equal_where(answer.images[0], picture, ImageChops.invert(white)) == 1
    both = mask((64, 64), box=(0.55, 0.3, 0.7, 0.7))
    assert looks_over_grey_like(answer.images[0], answer.images[1], both)


@needs("HRFix")
def test_a_unet_that_shrinks_the_picture_on_the_way(forge):
    """Layers without a condition image are sampled all the same; a condition image would have no place."""
    arguments = [True, 3, 2.0, 0, 1, True, "bicubic", "bicubic"]
    shrinking = {"alwayson_scripts": {"Kohya HRFix Integrated": {"args": arguments}}}
    assert alpha_varies(forge.picture(layerdiffuse(SD15_ATTENTION), SMALL, shrinking))
    given = layerdiffuse(SD15_FG_TO_BG, fg_image=cut_out((64, 64)))
    assert "makes it smaller on the way: MultiDiffusion, Kohya HRFix" in forge.txt2img(given, SMALL, shrinking).refusal
