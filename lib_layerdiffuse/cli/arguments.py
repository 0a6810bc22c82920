"""The words of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from lib_layerdiffuse.cli.models import USUAL_CFG, WORLD_CFG
from lib_layerdiffuse.images.reading import read_file
from lib_layerdiffuse.methods import Family
from lib_layerdiffuse.request.layers import FORM
from lib_layerdiffuse.vae import PASSES
from lib_layerdiffuse.version import own_version

ABOUT = """LayerDiffuse without a web UI.

    python -m lib_layerdiffuse generate --model MODEL --prompt "a glass bottle" --output out
    python -m lib_layerdiffuse methods
    python -m lib_layerdiffuse encode picture.png latent.safetensors
    python -m lib_layerdiffuse decode latent.safetensors picture.png
    python -m lib_layerdiffuse compose foreground.png background.png blend.png
    python -m lib_layerdiffuse metrics TRUTH RESULT

MODEL: a diffusers folder, a single SD1.5 or SDXL file, or a name on Hugging Face. Without it, the included models are
used (lib_layerdiffuse/world; see training/tiny), which know a few shapes, colours and materials.
"""
NOT_HERE = ("enabled", "output_origin")  # controls that mean something in a panel only
CONTROLS = [name for name in FORM.names if name not in NOT_HERE]

Command: TypeAlias = Callable[[argparse.Namespace], dict[str, Any]]  # answers what --json prints


def parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Sets `run` to the command that was asked for. commands: by name."""
    common, model, target = common_arguments(), model_arguments(), target_arguments()
    top = argparse.ArgumentParser(
        prog="lib_layerdiffuse", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--version", action="version", version=own_version())
    parsers = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, about: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        one: argparse.ArgumentParser = parsers.add_parser(
            name, help=about, description=about, parents=[common, *parents]
        )
        one.set_defaults(run=commands[name])
        return one

    command("methods", "what there is for `generate --method`")
    add_generate(command("generate", "make transparent pictures and layers", model))
    encoding = command("encode", "a picture with its transparency -> a latent", model, target)
    encoding.add_argument("picture", type=Path)
    encoding.add_argument("latent", type=Path, help="a new file, safetensors")
    decoding = command("decode", "a latent -> a picture with its transparency", model, target)
    decoding.add_argument("latent", type=Path, help="of `encode`, `generate --latents` or another program")
    decoding.add_argument("picture", type=Path, help="a new file; of several latents, several with a number")
    decoding.add_argument("--painted", type=Path, help="what the model's VAE shows of it; default: computed")
    decoding.add_argument("--passes", type=int, default=max(PASSES), choices=PASSES)
    composing = command("compose", "a foreground over a background", target)
    for name in ("foreground", "background", "blend"):
        composing.add_argument(name, type=Path)
    comparing = command("metrics", "how close transparent pictures come to others")
    comparing.add_argument("truth", type=Path, help="a picture, or a folder of them")
    comparing.add_argument("result", type=Path, help="the same, under the same names")
    comparing.add_argument("--lpips", action="store_true", help="needs torchvision, and the network at its first use")
    return top


def common_arguments() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print what was done as JSON, and no progress")
    common.add_argument("--verbose", action="store_true", help="say what is going on")
    return common


def target_arguments() -> argparse.ArgumentParser:
    target = argparse.ArgumentParser(add_help=False)
    target.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    return target


def model_arguments() -> argparse.ArgumentParser:
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument(
        "--model",
        help="a diffusers folder, a single SD1.5 or SDXL file, or a name on Hugging Face; default: the tiny world",
    )
    model.add_argument(
        "--config", help="for a single file, a diffusers folder with configs and tokenizers, to need no network"
    )
    model.add_argument(
        "--weights",
        type=Path,
        default=Path.home() / ".cache" / "layerdiffuse",
        help="where weight files are, or are downloaded to",
    )
    model.add_argument("--device", help="cuda, cpu, mps …; default: cuda where there is one")
    model.add_argument(
        "--family", choices=[each.value for each in Family], default=Family.SD15.value, help="of the model"
    )
    return model


def add_generate(making: argparse.ArgumentParser) -> None:
    making.add_argument("--prompt", required=True)
    making.add_argument("--negative", default="", help="what should not be seen")
    making.add_argument(
        "--output",
        type=Path,
        default=Path("layerdiffuse"),
        help="folder; default: %(default)s. Files are named by their seed, and replace no others",
    )
    making.add_argument("--seed", type=int, default=0, help="default: %(default)s; -1: another each time")
    making.add_argument("--count", type=int, default=1, help="how many pictures, each with all its layers")
    making.add_argument("--width", type=int, default=0, help="in pixels; default: what the model is used to")
    making.add_argument("--height", type=int, default=0)
    making.add_argument("--steps", type=int, default=25)
    making.add_argument("--cfg", type=float, help=f"default: {USUAL_CFG:g}, for the tiny world {WORLD_CFG:g}")
    making.add_argument("--sampler", default="Euler a")
    making.add_argument(
        "--init", type=Path, action="append", help="img2img: a picture to start from; several are taken in turn"
    )
    making.add_argument("--strength", type=float, default=0.75, help="of img2img, up to 1")
    making.add_argument("--latents", action="store_true", help="save latents beside the pictures")
    making.add_argument("--plain", action="store_true", help="without LayerDiffuse")
    for name in CONTROLS:
        making.add_argument(f"--{name.replace('_', '-')}", help=FORM.hint(name), **kind_of(name))


def kind_of(name: str) -> dict[str, Any]:
    """How the command line takes a control; None where it is not given."""
    if FORM.default(name) is False:
        return {"action": "store_true", "default": None}
    return {"type": lambda path: read_file(Path(path))} if name.endswith("_image") else {}
