"""SDXL layers in one run: each step is what it would be by hand."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

from tests.forge.client import (
    SDXL_BG_BLEND_TO_FG,
    SDXL_FG_BLEND_TO_BG,
    SDXL_FG_TO_BLEND,
    alpha_varies,
    layerdiffuse,
    same,
)
from tests.forge.test_interrupt import LIMIT_S, wait_for
from tests.forge.upstream_cases import layer_image

pytestmark = pytest.mark.sdxl

EVERYTHING = "(SDXL) From Prompt to Foreground, Blending and Background"
FROM_BACKGROUND = "(SDXL) From Background to Blending and Foreground"
TINY = {"width": 64, "height": 64, "steps": 2, "sampler_name": "DPM++ 2M"}


def difference(first, second):
    """Mean difference of the values of two pictures, of 255."""
    values = list(zip(first.tobytes(), second.tobytes()))
    return sum(abs(a - b) for a, b in values) / len(values)


def setting(infotext, name):
    return re.search(rf"{name}: ([^,\n]+)", infotext)[1]


def test_everything_from_a_prompt(forge, plain_pictures):
    before = forge.saved_files()
    prompts = {"bg_prompt": "wooden table"}
    answer = forge.txt2img(layerdiffuse(EVERYTHING, **prompts), TINY, save_images=True)
    assert answer.status == 200, answer.body
    assert [image.mode for image in answer.images] == ["RGBA", "RGB", "RGB", "RGB"]
    fg, blend, bg, _ = answer.images
    assert alpha_varies(fg)

    assert same(forge.picture(layerdiffuse(SDXL_FG_TO_BLEND, fg_image=fg), TINY), blend)
    by_hand = layerdiffuse(SDXL_FG_BLEND_TO_BG, stop=0.5, fg_image=fg, blend_image=blend, **prompts)
    assert same(forge.picture(by_hand, TINY, sampler_name="Euler a"), bg)

    assert [setting(text, "Sampler") for text in answer.infotexts[:3]] == ["DPM++ 2M", "DPM++ 2M", "Euler a"]
    assert [setting(text, "LayerDiffuse stop at") for text in answer.infotexts[:3]] == ["1.0", "1.0", "0.5"]
    assert "LayerDiffuse background prompt: wooden table" in answer.infotexts[2]
    assert "Euler a" in answer.notes
    saved = sorted(path.stem.partition("apple-")[2] for path in forge.saved_files() - before)
    assert saved == ["bg", "blend", "fg", "fg-opaque"]
    assert same(forge.picture(), plain_pictures["sdxl"])


@pytest.mark.full
def test_foreground_from_a_background(forge, plain_pictures):
    background = layer_image("bg_image", 64, 64)
    answer = forge.txt2img(layerdiffuse(FROM_BACKGROUND, bg_image=background), TINY, batch_size=2)
    assert answer.status == 200, answer.body
    assert [image.mode for image in answer.images] == ["RGB", "RGBA"] * 2 + ["RGB"] * 2
    assert len(answer.transparent) == 2
    for i, (blend, fg) in enumerate(zip(answer.images[0:4:2], answer.images[1:4:2])):
        # By hand a batch has one blend for all; alone, a picture is rounded otherwise than beside another.
        second_step = layerdiffuse(SDXL_BG_BLEND_TO_FG, bg_image=background, blend_image=blend)
        alone = forge.picture(second_step, TINY, sampler_name="Euler a", seed=1 + i)
        assert difference(alone, fg) < 1, (i, difference(alone, fg))
    assert same(forge.picture(), plain_pictures["sdxl"])


@pytest.mark.full
def test_batch_count(forge):
    answer = forge.txt2img(layerdiffuse(EVERYTHING), TINY, n_iter=2)
    assert [image.mode for image in answer.images] == ["RGBA", "RGB", "RGB"] * 2 + ["RGB"] * 2
    alone = forge.txt2img(layerdiffuse(EVERYTHING), TINY, seed=2)
    assert all(same(*pair) for pair in zip(answer.images[3:6], alone.images))


@pytest.mark.full
def test_an_interrupt_ends_the_chain(forge):
    def second_step_runs():
        state = forge.request("sdapi/v1/progress?skip_current_image=true").body["state"]
        return state["job_count"] == 3 and state["job_no"] == 1 and state["sampling_step"] >= 1

    with ThreadPoolExecutor() as pool:
        job = pool.submit(forge.txt2img, layerdiffuse(EVERYTHING), TINY, steps=4)
        wait_for(second_step_runs, 3 * LIMIT_S)
        forge.request("sdapi/v1/interrupt", {})
        answer = job.result(3 * LIMIT_S)
    assert answer.status == 200, answer.body
    assert alpha_varies(answer.images[0])
    assert "(SDXL) From Foreground and Blending to Background" not in "".join(answer.infotexts)


def test_a_chain_in_img2img_is_refused(forge):
    assert "txt2img" in forge.img2img(Image.new("RGB", (64, 64)), layerdiffuse(EVERYTHING), TINY).refusal
