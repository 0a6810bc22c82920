"""A tour without a web UI: transparent pictures and layers of the tiny world, put on one sheet.

    python examples/demo.py [demo.png]

What it does can be done with any SD1.5 or SDXL model and the released weights: see `python -m lib_layerdiffuse --help`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also from a checkout that is not installed

from lib_layerdiffuse.cli.models import WORLD_CFG, open_world, quieten
from lib_layerdiffuse.images.extras import on_checkerboard
from lib_layerdiffuse.images.rgba import over
from lib_layerdiffuse.methods import Family, Layer, find_method
from lib_layerdiffuse.request.layers import Request

SIZE = 128
MARGIN, LINE = 8, 16  # pixels
COLUMNS = 6
TRANSPARENT = (
    "a solid red star in the middle",
    "a soft blue ring at the top left",
    "a glass green disc in the middle",
    "a glowing yellow moon at the right",
    "a smoky purple square in the middle",
    "a hairy orange triangle at the bottom",
)
BACKGROUNDS = ("a checked green and yellow background", "a cloudy blue and cyan background")
TOGETHER = "a soft cyan moon in the middle"
BEHIND = "a striped purple and orange background"

# Methods, with the layout of SD1.5 or of SDXL as their keys say
ALONE = ("sd15_transparent_attn", "xl_transparent_attn", "xl_transparent_conv")
FROM_WORDS = ("sd15_joint", "xl_everything")
FROM_A_BACKGROUND = ("sd15_bg2fg", "xl_bg2blefg")

Row = tuple[str, Sequence[tuple[str, Image.Image]]]  # its title; pictures with what is said of each
Pictures = Mapping[Layer | None, Image.Image]


class World:
    """The tiny world's models."""

    def __init__(self) -> None:
        self.runners = {family: open_world(family) for family in Family}
        for runner in self.runners.values():
            runner.backend.pipeline.set_progress_bar_config(disable=True)

    def painted(self, prompt: str, seed: int, request: Request | None = None) -> Pictures:
        from lib_layerdiffuse.engine.runner import Task  # and with it libraries that are to be quiet by then

        runner = self.runners[request.method.family if request else Family.SDXL]
        [together] = runner.run(request, Task(prompt, seed=seed, width=SIZE, height=SIZE, cfg=WORLD_CFG))
        return {made.layer: made.image for made in together}

    def transparent(self, key: str) -> list[Image.Image]:
        request = Request.parse([{"method": key}])
        return [self.painted(prompt, 10 + i, request)[Layer.FG] for i, prompt in enumerate(TRANSPARENT)]

    def layers(self, key: str, background: str, image: Image.Image | None = None) -> Row:
        together = f"{TOGETHER} over {background}"
        words = {"fg_prompt": TOGETHER, "bg_prompt": background, "blend_prompt": together}
        made = self.painted("", 30, Request.parse([{"method": key, "bg_image": image, **words}]))
        return f"{find_method(key).full_title}: {together}", shown(made if image is None else {Layer.BG: image, **made})


def rows() -> list[Row]:
    world = World()
    alone = {key: world.transparent(key) for key in ALONE}
    behind = [world.painted(prompt, 20)[None] for prompt in BACKGROUNDS]
    said = [" ".join(prompt.split()[:4]) for prompt in TRANSPARENT]
    return [
        *((find_method(key).full_title, list(zip(said, map(on_checkerboard, made)))) for key, made in alone.items()),
        ("The same on new backgrounds", [("", over(each, behind[i % 2])) for i, each in enumerate(alone[ALONE[-1]])]),
        *(world.layers(key, BEHIND) for key in FROM_WORDS),
        *(world.layers(key, BACKGROUNDS[0], behind[0]) for key in FROM_A_BACKGROUND),
    ]


def shown(made: Pictures) -> list[tuple[str, Image.Image]]:
    foreground, background, blend = (made[layer] for layer in Layer)
    return [
        ("foreground", on_checkerboard(foreground)),
        ("background", background),
        ("blend", blend),
        ("over the background", over(foreground, background)),
    ]


def sheet(table: Sequence[Row]) -> Image.Image:
    width, height = SIZE + MARGIN, SIZE + 2 * LINE + MARGIN
    drawn = Image.new("RGB", (COLUMNS * width + MARGIN, len(table) * height + MARGIN), "white")
    pen = ImageDraw.Draw(drawn)
    for row, (title, pictures) in enumerate(table):
        top = MARGIN + row * height
        pen.text((MARGIN, top), title, fill="black")
        for column, (said, picture) in enumerate(pictures):
            left = MARGIN + column * width
            drawn.paste(picture, (left, top + LINE))
            pen.text((left, top + LINE + SIZE), said, fill="dimgrey")
    return drawn


def main() -> None:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "demo.png")
    quieten()
    started = time.perf_counter()
    sheet(rows()).save(path)
    print(f"{path}: made in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
