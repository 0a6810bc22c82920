"""Jobs whose latents are compared with those of the existing extension, and the table of what that one gave."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.forge.client import BASE_REQUEST, SD15_ATTENTION, SDXL_ATTENTION, SDXL_CONV, Forge, layerdiffuse

TABLE = Path(__file__).with_name("upstream_latents.json")


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

    @property
    def name(self) -> str:
        kind = "conv" if "Conv" in self.method else "attention"
        size = f"{self.width}x{self.height}-{self.steps}steps-batch{self.batch_size}"
        return f"{self.checkpoint}-{kind}-{size}-seed{self.seed}-weight{self.weight}-stop{self.stop}"


CASES = (
    Case("sd15", SD15_ATTENTION, seed=1, width=128, height=128, steps=2, batch_size=1),
    Case("sd15", SD15_ATTENTION, seed=7, width=192, height=128, steps=4, batch_size=2),
    Case("sd15", SD15_ATTENTION, seed=3, width=128, height=128, steps=4, batch_size=1, stop=0.5),
    Case("sdxl", SDXL_ATTENTION, seed=1, width=128, height=128, steps=2, batch_size=1),
    Case("sdxl", SDXL_CONV, seed=1, width=128, height=128, steps=2, batch_size=1),
    Case("sdxl", SDXL_ATTENTION, seed=7, width=128, height=128, steps=3, batch_size=2),
    Case("sdxl", SDXL_ATTENTION, seed=3, width=128, height=128, steps=3, batch_size=1, weight=0.5, stop=0.5),
)


def latents(forge: Forge, case: Case) -> list[dict]:
    """What the probe saw while the job of the case ran."""
    forge.use(case.checkpoint)
    fields = {key: value for key, value in asdict(case).items() if key in BASE_REQUEST or key == "batch_size"}
    with forge.probed() as probed:
        answer = forge.txt2img(layerdiffuse(case.method, case.weight, case.stop), **fields)
    assert answer.status == 200, answer.body
    assert len(probed) == case.batch_size, f"{len(probed)} latents recorded, {case.batch_size} expected"
    return probed


def read_table() -> dict:
    return json.loads(TABLE.read_text(encoding="utf-8"))
