"""Together with what else changes the UNet, the prompt or the sampler."""

import pytest

from tests.forge.client import SD15_ATTENTION, alpha_varies, layerdiffuse, same

SMALL = {"width": 64, "height": 64, "steps": 2}
LORA = {"prompt": "apple <lora:synthetic_lora_sd15:1>"}
GUIDANCE = {
    "SelfAttentionGuidance Integrated (SD 1.x, SD 2.x, SDXL)": [True, 0.5, 2.0, 1.0],
    "PerturbedAttentionGuidance Integrated": [True, 3.0, 0.0, 0.0, 1.0],
}
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


@pytest.mark.parametrize("script", GUIDANCE)
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
