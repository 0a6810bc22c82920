"""The screenshots of the documentation. Not among the tests, unless named:

    python -m pytest tests/page/screenshots.py

LAYERDIFFUSE_SCREENSHOTS  the folder they are put into; default: docs
"""

import io
import os
from pathlib import Path

from PIL import Image

from tests.page.tab import BACKGROUND, Tab, eventually
from tests.page.test_language import WORDS
from tools.forge import CHECKOUT

FOLDER = Path(os.environ.get("LAYERDIFFUSE_SCREENSHOTS", CHECKOUT / "docs"))
COLOURS = 160  # keeps the files small
LIMIT = 250_000


def save(what, name):
    path = FOLDER / f"{name}.png"
    image = Image.open(io.BytesIO(what.screenshot(animations="disabled"))).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < LIMIT


def save_panel(tab, cutout, name, method=BACKGROUND):
    """With a method that takes an image, and all that the status line can say."""
    tab.choose(method)
    tab.upload("fg_image", cutout)
    eventually(lambda: len(tab.status), 3)
    save(tab.panel, name)


def test_screenshots(txt2img, cutout):
    txt2img.prompt.fill("a glass bottle, high quality")
    for name, value in {"width": 384, "height": 320, "steps": 4}.items():
        txt2img.set_number(name, value)
    txt2img.made()
    txt2img.page.mouse.wheel(0, -10_000)
    save(txt2img.page, "txt2img")
    save_panel(txt2img, cutout, "panel")


def test_screenshot_in_chinese(page, in_chinese, cutout):
    """Needs a font that has the characters."""
    in_chinese()
    tab = Tab(page, "txt2img")
    tab.open()
    save_panel(tab, cutout, "panel-zh", WORDS[BACKGROUND])
