"""What is said of the pictures that a script has put together."""

import pytest
from PIL import Image

from lib_layerdiffuse.webui.outputs import mark
from lib_layerdiffuse.webui.script_runs import ScriptRun

GLASS = Image.new("RGBA", (4, 4), (200, 0, 0, 128))
CANVAS = Image.new("RGB", (4, 4))
STEALTH = Image.new("RGBA", (4, 4), (0, 0, 0, 254))  # as Forge leaves a canvas that it has saved
OF_OURS = mark(Image.new("RGB", (4, 4)))  # a background


@pytest.mark.parametrize(
    ("title", "foregrounds", "images", "expected"),
    [
        ("X/Y/Z plot", 2, [GLASS, OF_OURS], None),
        ("X/Y/Z plot", 0, [CANVAS], None),
        ("Mosaic", 2, [STEALTH], "Mosaic puts pictures together without transparency"),
        (
            "SD upscale",
            4,
            [CANVAS],
            "upscale puts pictures together without transparency: its pictures have none. Img2",
        ),
        ("Poor man's outpainting", 1, [CANVAS], "its pictures have none. To add something beside a cut-out"),
        ("Prompts from file or textbox", 2, [CANVAS, GLASS, GLASS], "1 of its pictures have none. The single pictures"),
    ],
)
def test_a_picture_that_lost_its_transparency_is_noted(title, foregrounds, images, expected):
    notes = list(ScriptRun(title, foregrounds).notes(images))
    assert len(notes) == (expected is not None)
    assert (expected or "") in "".join(notes)


def test_refusals_are_told_once_each():
    run = ScriptRun("X/Y/Z plot")
    for sentence in ("Weight is 3.", "No checkpoint.", "Weight is 3."):
        run.refusals[sentence] = None
    assert list(run.notes([])) == ["Weight is 3.", "No checkpoint."]


@pytest.mark.parametrize(
    ("title", "expected"), [("SD upscale", True), ("Outpainting mk2", True), ("Loopback", False), ("", False)]
)
def test_which_scripts_get_opaque_pictures(title, expected):
    assert ScriptRun(title).is_opaque is expected
