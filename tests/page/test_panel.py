"""The panel shows what the chosen method needs, and says what will happen."""

import re

from playwright.sync_api import expect

from tests.forge.client import (
    SD15_ATTENTION,
    SD15_BG_TO_FG,
    SD15_FG_TO_BG,
    SD15_JOINT,
    SDXL_ATTENTION,
    SDXL_BG_BLEND_TO_FG,
    SDXL_BG_TO_BLEND,
    SDXL_CONV,
    SDXL_FG_BLEND_TO_BG,
    SDXL_FG_TO_BLEND,
    alpha_varies,
)
from tests.page.tab import CONDITIONAL, checkpoint, eventually

SDXL_EVERYTHING = "(SDXL) From Prompt to Foreground, Blending and Background"
SDXL_BG_TO_BLEND_FG = "(SDXL) From Background to Blending and Foreground"
DECODED = {"passes", "grey_background"}
# All there are, in their order, with what the panel shows for each.
SHOWN = {
    SD15_ATTENTION: {"fg_prompt", *DECODED},
    SD15_FG_TO_BG: {"fg_image", "resize_mode", "bg_prompt", "blend_prompt"},
    SD15_BG_TO_FG: {"bg_image", "resize_mode", "fg_prompt", "blend_prompt", *DECODED},
    SD15_JOINT: {"fg_prompt", "bg_prompt", "blend_prompt", *DECODED},
    SDXL_ATTENTION: {"fg_prompt", *DECODED},
    SDXL_CONV: {"fg_prompt", *DECODED},
    SDXL_FG_TO_BLEND: {"fg_image", "resize_mode", "blend_prompt"},
    SDXL_FG_BLEND_TO_BG: {"fg_image", "blend_image", "resize_mode", "bg_prompt"},
    SDXL_BG_TO_BLEND: {"bg_image", "resize_mode", "blend_prompt"},
    SDXL_BG_BLEND_TO_FG: {"bg_image", "blend_image", "resize_mode", "fg_prompt", *DECODED},
    SDXL_EVERYTHING: {"fg_prompt", "bg_prompt", "blend_prompt", *DECODED},
    SDXL_BG_TO_BLEND_FG: {"bg_image", "resize_mode", "fg_prompt", "blend_prompt", *DECODED},
}
SD15, SDXL = list(SHOWN)[:4], list(SHOWN)[4:]


def test_each_method_shows_what_it_uses_and_explains_it(txt2img):
    txt2img.part("all_methods").locator("input").check()
    eventually(lambda: txt2img.methods, list(SHOWN))
    for method in [*SHOWN, SD15_ATTENTION]:  # which was chosen already the first time
        txt2img.choose(method)
        eventually(lambda: (txt2img.method, txt2img.visible), (method, SHOWN[method]))
    for name in ("method", "all_methods", "weight", "starting_step", "ending_step", *CONDITIONAL):
        expect(txt2img.part(name)).to_have_attribute("title", re.compile(r"^[A-Z].{20,}\.$"))


def test_the_list_is_that_of_the_checkpoint(txt2img):
    assert txt2img.methods == SD15
    every = txt2img.part("all_methods").locator("input")
    every.check()
    eventually(lambda: txt2img.methods, list(SHOWN))
    every.uncheck()
    eventually(lambda: txt2img.methods, SD15)


def test_another_checkpoint_brings_its_own_methods(txt2img):
    for method, counterpart in {SD15_ATTENTION: SDXL_ATTENTION, SD15_JOINT: SDXL_EVERYTHING}.items():
        txt2img.choose(method)
        with checkpoint(txt2img.page, "synthetic_sdxl"):
            eventually(lambda: (txt2img.method, txt2img.visible), (counterpart, SHOWN[counterpart]))
            assert txt2img.methods == SDXL
        eventually(lambda: txt2img.method, method)
        assert txt2img.methods == SD15


# batch size, and the whole line
STATUS = {
    SD15_ATTENTION: (1, ["1 image per picture: foreground", "weights are present"]),
    SD15_JOINT: (
        2,
        ["3 images per picture: foreground · background · blend", "batch size 2 becomes 3", "weights are present"],
    ),
    SD15_FG_TO_BG: (4, ["2 images per picture: background · blend", "weights are present"]),
    SDXL_CONV: (
        1,
        [
            "needs a checkpoint of this kind: SDXL – the chosen one is SD1.5",
            "1 image per picture: foreground",
            "weights are present",
        ],
    ),
    SDXL_EVERYTHING: (
        2,
        [
            "needs a checkpoint of this kind: SDXL – the chosen one is SD1.5",
            "3 images per picture: foreground · blend · background",
            "3 runs, one after the other",
            "weights are present",
        ],
    ),
}


def test_the_status_line_says_what_will_happen(txt2img):
    txt2img.part("all_methods").locator("input").check()
    for method, (batch_size, sentences) in STATUS.items():
        txt2img.choose(method)
        txt2img.set_number("batch_size", batch_size)
        eventually(lambda: txt2img.status, sentences)


def test_a_refused_job_says_why_and_the_next_one_works(txt2img):
    txt2img.choose(SD15_FG_TO_BG)
    txt2img.generate()
    assert f"{SD15_FG_TO_BG} needs a foreground image." in txt2img.log.inner_text()
    assert txt2img.addresses == []
    txt2img.choose(SD15_ATTENTION)
    assert [alpha_varies(picture) for picture in txt2img.made()] == [True, False]
