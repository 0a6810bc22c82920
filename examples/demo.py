"""A tour without a web UI: transparent pictures and layers of the tiny world, put on one sheet.

    python examples/demo.py [demo.png]

What it does can be done with any SD1.5 or SDXL model and the released weights: see `python -m lib_layerdiffuse --help`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also from a checkout that is not installed

from lib_layerdiffuse.__main__ import WORLD_CFG, open_world, quieten
from lib_layerdiffuse.images import over
from lib_layerdiffuse.methods import Family, Layer
from lib_layerdiffuse.outputs import on_checkerboard
from lib_layerdiffuse.request import Request

if TYPE_CHECKING:
    from lib_layerdiffuse.studio import Job, Studio

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

Row = tuple[str, Sequence[tuple[str, Image.Image]]]  # its title; pictures with what is said of each


def request(key: str, **more: object) -> Request:
    found = Request.parse([{"method": key, **more}])
    assert found is not None
    return found


def job(prompt: str, seed: int) -> Job:
    from lib_layerdiffuse.studio import Job  # and with it libraries that are to be quiet by then

    return Job(prompt, seed=seed, width=SIZE, height=SIZE, cfg=WORLD_CFG)


def rows() -> list[Row]:
    studio = open_world(Family.SDXL)
    studio.host.pipeline.set_progress_bar_config(disable=True)
    attention, conv = (
        [studio.run(request(key), job(prompt, 10 + i))[0][0].image for i, prompt in enumerate(TRANSPARENT)]
        for key in ("xl_transparent_attn", "xl_transparent_conv")
    )
    painted = [studio.run(None, job(prompt, 20))[0][0].image for prompt in BACKGROUNDS]
    chain = layers(studio, request("xl_everything", **words(BEHIND)))
    given = layers(studio, request("xl_bg2blefg", bg_image=painted[0], **words(BACKGROUNDS[0])))
    said = [" ".join(prompt.split()[:4]) for prompt in TRANSPARENT]
    return [
        ("Attention injection", list(zip(said, map(on_checkerboard, attention)))),
        ("Conv injection", list(zip(said, map(on_checkerboard, conv)))),
        ("The same on new backgrounds", [("", over(each, painted[i % 2])) for i, each in enumerate(conv)]),
        (f"All layers from words: {TOGETHER} over {BEHIND}", shown(chain)),
        (f"Layers for a background: {TOGETHER}", shown(given | {Layer.BG: painted[0]})),
    ]


def words(background: str) -> dict[str, str]:
    return {"fg_prompt": TOGETHER, "bg_prompt": background, "blend_prompt": f"{TOGETHER} over {background}"}


def layers(studio: Studio, asked: Request) -> dict[Layer, Image.Image]:
    return {made.layer: made.image for made in studio.run(asked, job("", 30))[0] if made.layer}


def shown(made: Mapping[Layer, Image.Image]) -> list[tuple[str, Image.Image]]:
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
