"""Make the tiny world: train everything in it, one program after the other, and gather what the extension ships.

    python -m training.tiny WORK WORLD [--only NAME …]

WORK: a folder for states and logs; a stage that was stopped goes on where it was, one that has its files is left out.
WORLD: a folder for the finished models and weights, and for world.json, which says how they were made.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from lib_layerdiffuse.methods import METHODS, Family
from training.tiny.models import SIZE

PAIR = {"encoder": Family.SDXL.encoder, "decoder": Family.SDXL.decoder}
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "peft")
SHARED = {"size": SIZE, "schedule": "cosine", "warmup": 100, "workers": 2, "save_every": 500}


@dataclass(frozen=True)
class Stage:
    """A program, and the options that are its own. `{work}` in a value is the folder with all stages' outputs."""

    name: str
    program: str
    options: Mapping[str, object]

    def command(self, work: Path, output: Path) -> list[str]:
        options = SHARED | self.options | {"output": output}
        words: list[str] = ["-m", self.program]
        for name, value in options.items():
            values = value if isinstance(value, tuple) else (value,)
            words += [f"--{name.replace('_', '-')}", *(str(each).format(work=work) for each in values)]
        return words


def base(family: Family, seed: int) -> Stage:
    options = {"family": family.value, "vae": "{work}/vae", "data": f"pictures:{seed}", "seed": seed}
    return Stage(
        family.value, "training.tiny.base", options | {"batch": 32, "rate": 1e-3, "steps": 6000, "keep": 12_000}
    )


def injection(key: str, seed: int, name: str = "", **more: object) -> Stage:
    method = next(method for method in METHODS if method.key == key)
    options = {"model": f"{{work}}/{method.family.value}", "method": key, "data": f"scenes:{seed}", "seed": seed}
    if method.makes_foreground:
        options["encoder"] = f"{{work}}/pair/{PAIR['encoder']}"
    return Stage(name or key, "training.injection", options | {"batch": 16, "keep": 4000} | more)


def after(name: str) -> dict[str, str]:
    """The weights of a stage to go on from, which is named for its method and a number."""
    return {"start": f"{{work}}/{name}/layer_{name[:-2]}.safetensors"}


SHARING = {"rank": 16, "signal": 8, "rate": 1e-3, "steps": 2500}
OFFSET = {"noise_offset": 0.1}  # else a frame's colours follow the mean of its own noise, which is not small at 16×16
LOW_RANK = {"rank": 32, "rate": 1e-3, "steps": 4000}
WEIGHTS = {"rate": 1e-3, "steps": 1500}

STAGES = (
    Stage(
        "vae",
        "training.tiny.vae",
        {
            "data": "scenes:1+pictures:1",
            "crop": 64,
            "batch": 8,
            "rate": 2e-3,
            "steps": 10_000,
            "ema": 0.995,
            "keep": 6000,
        },
    ),
    Stage(
        "pair",
        "training.transparent_vae",
        {
            "vae": "{work}/vae",
            "data": "scenes:2+scenes:3+pictures:2",
            "crop": 64,
            "batch": 8,
            "rate": 1e-3,
            "steps": 8000,
            "ema": 0.995,
            "keep": 6000,
            "noise": 0.02,
            "reconstruction": 0.1,
            "composed": 1.0,
            "identity": 2.0,
            "adversarial_from": 1_000_000,  # a PatchGAN has nothing to say about flat shapes
            "encoder_widths": (16, 16, 32, 32, 64, 64, 64, 64),
            "decoder_widths": (16, 16, 32, 32, 48, 64, 64),
        },
    ),
    base(Family.SD15, 4),
    base(Family.SDXL, 5),
    injection("sd15_transparent_attn", 11, **SHARING | {"steps": 4000}),
    injection("sd15_joint", 12, "sd15_joint_1", **SHARING),
    injection("sd15_joint", 21, **after("sd15_joint_1"), **SHARING | OFFSET),
    injection("sd15_fg2bg", 13, "sd15_fg2bg_1", **SHARING | OFFSET | {"steps": 1200}),
    # A lower rank keeps the world within 40 MB.
    injection("sd15_fg2bg", 24, **after("sd15_fg2bg_1"), **SHARING | OFFSET | {"steps": 600, "rank": 14}),
    injection("sd15_bg2fg", 14, "sd15_bg2fg_1", **SHARING),
    injection("sd15_bg2fg", 22, "sd15_bg2fg_2", **after("sd15_bg2fg_1"), **SHARING | OFFSET | {"steps": 1200}),
    injection("sd15_bg2fg", 23, **after("sd15_bg2fg_2"), **SHARING | OFFSET | {"steps": 800}),
    injection("xl_transparent_attn", 15, **LOW_RANK),
    injection("xl_transparent_conv", 16, **WEIGHTS),
    injection("xl_fg2ble", 17, **WEIGHTS),
    injection("xl_fgble2bg", 18, **WEIGHTS),
    injection("xl_bg2ble", 19, **WEIGHTS),
    injection("xl_bgble2fg", 20, **WEIGHTS),
)


def run(stage: Stage, work: Path) -> None:
    """Train, unless that is done; note how, and how long it took."""
    output, done = work / stage.name, work / f"{stage.name}.json"
    if done.exists():
        return
    command = stage.command(work, output)
    started = time.time()
    subprocess.run([sys.executable, *command], check=True)
    row = {"command": stage.command(Path("WORK"), Path("WORK") / stage.name), "seconds": round(time.time() - started)}
    done.write_text(json.dumps(row), encoding="utf-8")


def gather(work: Path, world: Path) -> None:
    """What the extension ships."""
    for name in ("vae", *(family.value for family in Family)):
        left = shutil.ignore_patterns("state", "log", "vae")  # both families have the one that is copied by itself
        shutil.copytree(work / name, world / name, ignore=left, dirs_exist_ok=True)
    weights = world / "weights"
    weights.mkdir(parents=True, exist_ok=True)
    for file in PAIR.values():  # both families have one VAE, and so one pair
        shutil.copyfile(work / "pair" / file, weights / file)
    for method in METHODS:
        if (file := work / method.key / method.weights).exists():
            shutil.copyfile(file, weights / method.weights)
    about = {
        "stages": {stage.name: account(work / f"{stage.name}.json") for stage in STAGES},
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        + (torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"),
        "packages": {name: version(name) for name in PACKAGES},
    }
    (world / "world.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def account(file: Path) -> dict[str, object]:
    """How a stage was made, for people to read and repeat."""
    row = json.loads(file.read_text(encoding="utf-8"))
    return row | {"command": shlex.join(["python", *row["command"]])}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("world", type=Path)
    parser.add_argument("--only", nargs="+", default=[stage.name for stage in STAGES], help="stages to train now")
    arguments = parser.parse_args(words)
    for stage in STAGES:
        if stage.name in arguments.only:
            run(stage, arguments.work)
    if all((arguments.work / f"{stage.name}.json").exists() for stage in STAGES):
        gather(arguments.work, arguments.world)


if __name__ == "__main__":
    main()
