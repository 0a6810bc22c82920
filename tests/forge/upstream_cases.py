"""Jobs whose latents are compared with those of the existing extension, and the table of what that one gave."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from tests.forge.client import (
    BASE_REQUEST,
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
    Forge,
    layerdiffuse,
)

TABLE = Path(__file__).with_name("upstream_latents.json")

# A method's name in a case's name, and the layer images that it takes.
METHODS = {
    SD15_ATTENTION: ("attention", ()),
    SD15_JOINT: ("joint", ()),
    SD15_FG_TO_BG: ("fg2bg", ("fg_image",)),
    SD15_BG_TO_FG: ("bg2fg", ("bg_image",)),
    SDXL_ATTENTION: ("attention", ()),
    SDXL_CONV: ("conv", ()),
    SDXL_FG_TO_BLEND: ("fg2ble", ("fg_image",)),
    SDXL_FG_BLEND_TO_BG: ("fgble2bg", ("fg_image", "blend_image")),
    SDXL_BG_TO_BLEND: ("bg2ble", ("bg_image",)),
    SDXL_BG_BLEND_TO_FG: ("bgble2fg", ("bg_image", "blend_image")),
}
# What a layer image shows, for R, G, B and A: the value in the upper left corner, what is added towards the right edge,
# and what towards the lower one. No two images and no two channels are alike, and only the foreground is transparent.
RAMPS = {
    "fg_image": ((255, -200, -30), (40, 60, 150), (0, 100, 50), (0, 155, 100)),
    "bg_image": ((20, 0, 200), (230, -100, -100), (90, 120, 0), (255, 0, 0)),
    "blend_image": ((0, 180, 70), (120, -80, 60), (255, 0, -240), (255, 0, 0)),
}


def ramp(start: int, right: int, down: int, width: int, height: int) -> Image.Image:
    values = (start + right * x // (width - 1) + down * y // (height - 1) for y in range(height) for x in range(width))
    return Image.frombytes("L", (width, height), bytes(values))


def layer_image(name: str, width: int, height: int) -> Image.Image:
    """Of the job's size, so that neither extension resizes it."""
    return Image.merge("RGBA", [ramp(*values, width, height) for values in RAMPS[name]])


@dataclass(frozen=True)
class Case:
    checkpoint: str
    method: str
    seed: int
    width: int
    height: int
    steps: int
    batch_size: int
    weight: float = 1.0
    stop: float = 1.0
    fg_prompt: str = ""
    bg_prompt: str = ""
    blend_prompt: str = ""

    @property
    def prompts(self) -> dict[str, str]:
        """The additional prompts that it has."""
        return {key: value for key, value in asdict(self).items() if key.endswith("_prompt") and value}

    @property
    def images(self) -> dict[str, Image.Image]:
        return {name: layer_image(name, self.width, self.height) for name in METHODS[self.method][1]}

    @property
    def name(self) -> str:
        kind = METHODS[self.method][0]
        size = f"{self.width}x{self.height}-{self.steps}steps-batch{self.batch_size}"
        name = f"{self.checkpoint}-{kind}-{size}-seed{self.seed}-weight{self.weight}-stop{self.stop}"
        return "-".join([name, *self.prompts])


BACKGROUND_PROMPTS = {"bg_prompt": "wooden table", "blend_prompt": "green apple on a table"}
JOINT_PROMPTS = {"fg_prompt": "green apple", **BACKGROUND_PROMPTS}
# Of the layer methods only batches that the existing extension supports: for SD1.5 multiples of the number of layers,
# for SDXL one picture.
CASES = (
    Case("sd15", SD15_ATTENTION, seed=1, width=128, height=128, steps=2, batch_size=1),
    Case("sd15", SD15_ATTENTION, seed=7, width=192, height=128, steps=4, batch_size=2),
    Case("sd15", SD15_ATTENTION, seed=3, width=128, height=128, steps=4, batch_size=1, stop=0.5),
    Case("sd15", SD15_JOINT, seed=1, width=128, height=64, steps=2, batch_size=3),
    Case("sd15", SD15_JOINT, seed=5, width=64, height=64, steps=2, batch_size=3, **JOINT_PROMPTS),
    Case("sd15", SD15_JOINT, seed=9, width=64, height=64, steps=2, batch_size=6),
    Case("sd15", SD15_FG_TO_BG, seed=1, width=128, height=64, steps=2, batch_size=2),
    Case("sd15", SD15_FG_TO_BG, seed=5, width=64, height=64, steps=2, batch_size=2, **BACKGROUND_PROMPTS),
    Case("sd15", SD15_FG_TO_BG, seed=3, width=64, height=64, steps=4, batch_size=2, stop=0.5),
    Case("sd15", SD15_BG_TO_FG, seed=1, width=128, height=64, steps=2, batch_size=2),
    Case("sd15", SD15_BG_TO_FG, seed=5, width=64, height=64, steps=2, batch_size=4, fg_prompt="green apple"),
    Case("sdxl", SDXL_ATTENTION, seed=1, width=128, height=128, steps=2, batch_size=1),
    Case("sdxl", SDXL_CONV, seed=1, width=128, height=128, steps=2, batch_size=1),
    Case("sdxl", SDXL_ATTENTION, seed=7, width=128, height=128, steps=3, batch_size=2),
    Case("sdxl", SDXL_ATTENTION, seed=3, width=128, height=128, steps=3, batch_size=1, weight=0.5, stop=0.5),
    Case("sdxl", SDXL_FG_TO_BLEND, seed=1, width=128, height=128, steps=2, batch_size=1),
    Case("sdxl", SDXL_FG_BLEND_TO_BG, seed=5, width=128, height=128, steps=2, batch_size=1, weight=0.5),
    Case("sdxl", SDXL_BG_TO_BLEND, seed=3, width=128, height=128, steps=4, batch_size=1, stop=0.5),
    Case("sdxl", SDXL_BG_BLEND_TO_FG, seed=1, width=128, height=128, steps=2, batch_size=1),
)


def latents(forge: Forge, case: Case) -> list[dict]:
    """What the probe saw while the job of the case ran."""
    forge.use(case.checkpoint)
    fields = {key: value for key, value in asdict(case).items() if key in BASE_REQUEST or key == "batch_size"}
    with forge.probed() as probed:
        field = layerdiffuse(case.method, case.weight, case.stop, **case.images, **case.prompts)
        answer = forge.txt2img(field, **fields)
    assert answer.status == 200, answer.body
    assert len(probed) == case.batch_size, f"{len(probed)} latents recorded, {case.batch_size} expected"
    return probed


def read_table() -> dict:
    return json.loads(TABLE.read_text(encoding="utf-8"))
