"""The panel shows what the chosen method needs, and says what will happen."""

import re

from playwright.sync_api import expect

from tests.forge.client import SD15_FG_TO_BG, alpha_varies
from tests.page.tab import BACKGROUND, CONDITIONAL, FOREGROUND, LAYERS, TRANSPARENT, checkpoint, eventually
from tools.forge import CHECKOUT

CONV = "Transparent picture by conv (SDXL)"
DECODED = {"passes", "grey_background"}
# All there are, in their order, with what the panel shows for each.
SHOWN = {
    f"{TRANSPARENT} (SD1.5)": {"fg_prompt", *DECODED},
    f"{BACKGROUND} (SD1.5)": {"fg_image", "resize_mode", "bg_prompt", "blend_prompt"},
    f"{FOREGROUND} (SD1.5)": {"bg_image", "resize_mode", "fg_prompt", "blend_prompt", *DECODED},
    f"{LAYERS} (SD1.5)": {"fg_prompt", "bg_prompt", "blend_prompt", *DECODED},
    f"{TRANSPARENT} (SDXL)": {"fg_prompt", *DECODED},
    CONV: {"fg_prompt", *DECODED},
    "Blend for a foreground (SDXL)": {"fg_image", "resize_mode", "blend_prompt"},
    "Background for a foreground and its blend (SDXL)": {"fg_image", "blend_image", "resize_mode", "bg_prompt"},
    "Blend for a background (SDXL)": {"bg_image", "resize_mode", "blend_prompt"},
    "Foreground for a background and its blend (SDXL)": {
        "bg_image",
        "blend_image",
        "resize_mode",
        "fg_prompt",
        *DECODED,
    },
    f"{LAYERS} (SDXL)": {"fg_prompt", "bg_prompt", "blend_prompt", *DECODED},
    f"{FOREGROUND} (SDXL)": {"bg_image", "resize_mode", "fg_prompt", "blend_prompt", *DECODED},
}
SD15 = [TRANSPARENT, BACKGROUND, FOREGROUND, LAYERS]
SDXL = [title.removesuffix(" (SDXL)") for title in list(SHOWN)[4:]]


def test_each_method_shows_what_it_uses_and_explains_it(txt2img):
    txt2img.part("all_methods").locator("input").check()
    eventually(lambda: txt2img.methods, list(SHOWN))
    for method in [*SHOWN, next(iter(SHOWN))]:  # which was chosen already the first time
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
    for method in (TRANSPARENT, LAYERS):
        txt2img.choose(method)
        with checkpoint(txt2img.page, "synthetic_sdxl"):
            eventually(lambda: (txt2img.method, txt2img.visible), (method, SHOWN[f"{method} (SDXL)"]))
            eventually(lambda: txt2img.methods, SDXL)
        eventually(lambda: txt2img.methods, SD15)
        assert txt2img.method == method


# batch size, and the whole line
STATUS = {
    f"{TRANSPARENT} (SD1.5)": (1, ["1 image per picture: foreground", "weights are present"]),
    f"{LAYERS} (SD1.5)": (
        2,
        ["3 images per picture: foreground · background · blend", "batch size 2 becomes 3", "weights are present"],
    ),
    f"{BACKGROUND} (SD1.5)": (4, ["2 images per picture: background · blend", "weights are present"]),
    CONV: (
        1,
        [
            "needs a checkpoint of this kind: SDXL – the chosen one is SD1.5",
            "1 image per picture: foreground",
            "weights are present",
        ],
    ),
    f"{LAYERS} (SDXL)": (
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


def test_the_status_line_knows_what_infotexts_call_the_method(txt2img):
    txt2img.choose(BACKGROUND)
    expect(txt2img.part("status").locator("[title]")).to_have_attribute(
        "title", f"LayerDiffuse method: {SD15_FG_TO_BG} (sd15_fg2bg)"
    )


def test_the_version_is_that_of_the_project(txt2img):
    text = (CHECKOUT / "pyproject.toml").read_text(encoding="utf-8")
    [version] = re.findall(r'^version = "(.+)"', text, re.MULTILINE)
    expect(txt2img.part("version")).to_have_text(f"LayerDiffuse {version}")


def test_a_refused_job_says_why_and_the_next_one_works(txt2img):
    txt2img.choose(BACKGROUND)
    txt2img.generate()
    assert f"{BACKGROUND} (SD1.5) needs a foreground image." in txt2img.log.inner_text()
    assert txt2img.addresses == []
    txt2img.choose(TRANSPARENT)
    assert [alpha_varies(picture) for picture in txt2img.made()] == [True, False]
