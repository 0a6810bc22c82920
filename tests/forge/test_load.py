"""Many jobs at once, good and bad, and some of them interrupted: each gets its answer, and memory does not grow."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import pytest
from PIL import Image

from tests.forge.client import (
    SD15_ATTENTION,
    SD15_BG_TO_FG,
    SD15_FG_TO_BG,
    SD15_JOINT,
    Answer,
    Forge,
    layerdiffuse,
    layerdiffuse_arguments,
    same,
    to_base64,
)
from tests.forge.upstream_cases import layer_image

SIZE = (64, 64)
TINY = {"width": 64, "height": 64, "cfg_scale": 1}  # at 1 the UNet has half of the work
START = {"init_images": [to_base64(layer_image("fg_image", *SIZE))], "denoising_strength": 0.7, "steps": 2}
BETWEEN_INTERRUPTS_S = 5
ALLOWED_GROWTH_MB = 300


@dataclass(frozen=True)
class Kind:
    """A kind of job, and the modes of the pictures that it answers with; without modes, it is refused."""

    endpoint: str
    fields: Sequence[dict]
    modes: tuple[str, ...] = ()


# In an order in which nearly each needs other weights than the one before.
KINDS = {
    "transparent": Kind("txt2img", [layerdiffuse(SD15_ATTENTION)], ("RGBA", "RGB")),
    "no such method": Kind("txt2img", [layerdiffuse_arguments(True, "everything")]),
    "joint": Kind("txt2img", [layerdiffuse(SD15_JOINT)], ("RGBA", "RGB", "RGB", "RGB")),
    "from a foreground": Kind(
        "txt2img", [layerdiffuse(SD15_FG_TO_BG, fg_image=layer_image("fg_image", *SIZE))], ("RGB", "RGB")
    ),
    "plain": Kind("txt2img", [], ("RGB",)),
    "a broken picture": Kind("txt2img", [layerdiffuse_arguments({"method": "sd15_fg2bg", "fg_image": "AAAA"})]),
    "from a background": Kind(
        "txt2img",
        [layerdiffuse(SD15_BG_TO_FG, bg_image=layer_image("bg_image", *SIZE)), {"steps": 2}],
        ("RGBA", "RGB", "RGB"),
    ),
    "img2img": Kind("img2img", [layerdiffuse(SD15_ATTENTION), START], ("RGBA", "RGB")),
    "a weight that is none": Kind("img2img", [layerdiffuse(SD15_ATTENTION, weight=float("nan")), START]),
    "two at a time": Kind("txt2img", [layerdiffuse(SD15_ATTENTION), {"batch_size": 2}], ("RGBA", "RGBA", "RGB", "RGB")),
}


def sent(forge: Forge, kind: Kind) -> Answer:
    return forge.job(kind.endpoint, *kind.fields, TINY)


def private_mb(forge: Forge) -> float:
    """What the server has for itself: without the model files, which are mapped and can be dropped again."""
    status = Path(f"/proc/{forge.server.process.pid}/status").read_text(encoding="utf-8")
    return int(dict(line.split(":", 1) for line in status.splitlines())["RssAnon"].split()[0]) / 1024


def interrupting(forge: Forge, working: Callable[[], bool]) -> int:
    """Interrupt whatever runs, some seconds apart, while there is work. Says how often."""
    times = 0
    while working():
        time.sleep(BETWEEN_INTERRUPTS_S)
        assert forge.request("sdapi/v1/interrupt", {}).status == 200
        times += 1
    return times


def answered(kind: Kind, answer: Answer) -> bool:
    """Whether it has all that it should have. A job that was interrupted too early has fewer pictures."""
    if not kind.modes:
        return bool(answer.refusal)
    assert answer.status == 200, answer.body
    modes = tuple(image.mode for image in answer.images)
    return modes == kind.modes and len(answer.transparent) == modes.count("RGBA")


def one_by_one(forge: Forge) -> list[Image.Image]:
    """Three jobs, and what they make. The change of weights between them returns what others before them had freed."""
    answers = [(KINDS[name], sent(forge, KINDS[name])) for name in ("joint", "img2img", "transparent")]
    assert all(answered(*pair) for pair in answers)
    return [answer.images[0] for _, answer in answers]


@pytest.mark.parametrize("count", [12, pytest.param(50, marks=pytest.mark.full)])
def test_many_jobs_at_once(forge, count):
    before, memory = one_by_one(forge), private_mb(forge)

    jobs = list(islice(cycle(KINDS.values()), count))
    with ThreadPoolExecutor(count + 1) as pool:
        answers = [pool.submit(sent, forge, kind) for kind in jobs]
        interrupts = pool.submit(interrupting, forge, lambda: not all(answer.done() for answer in answers))
    short = [kind for kind, answer in zip(jobs, answers, strict=True) if not answered(kind, answer.result())]
    assert len(short) <= interrupts.result() > 0, short
    at_once = private_mb(forge) - memory

    assert all(same(*pair) for pair in zip(one_by_one(forge), before, strict=True))
    growth = private_mb(forge) - memory
    forge.notes.append(
        f"{count} jobs at once: private memory {memory:.0f} MB before, {at_once:+.0f} MB after them, "
        f"{growth:+.0f} MB after three more"
    )
    assert growth < ALLOWED_GROWTH_MB
