"""LayerDiffuse without a web UI.

    python -m lib_layerdiffuse generate --model MODEL --prompt "a glass bottle" --output out
    python -m lib_layerdiffuse encode picture.png latent.safetensors
    python -m lib_layerdiffuse decode latent.safetensors picture.png
    python -m lib_layerdiffuse compose foreground.png background.png blend.png
    python -m lib_layerdiffuse metrics TRUTH RESULT

MODEL: a diffusers folder, a single SD1.5 or SDXL file, or a hub name. Without it, the models in lib_layerdiffuse/world
are used (see training/tiny), where there are some; they know a few shapes, colours and materials.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images import from_pil, over, to_pil
from lib_layerdiffuse.methods import DECODERS, ENCODERS, Family
from lib_layerdiffuse.request import FORM, Request
from lib_layerdiffuse.vae import PASSES

WORLD = Path(__file__).parent / "world"
WORLD_CFG, USUAL_CFG = 3.0, 7.0
NOT_HERE = ("enabled", "output_origin")  # controls that mean something in a panel only


def main(words: Sequence[str] | None = None) -> None:
    try:
        arguments = parser().parse_args(words)
        quieten()
        logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(message)s")
        found = arguments.run(arguments)
    except (LayerDiffuseError, OSError, ValueError) as error:
        sys.exit(str(error))
    except ImportError as error:
        sys.exit(f"{error}. Install what this command needs: pip install -r examples/requirements.txt")
    if arguments.json:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
    else:
        for line in found.get("files", [f"{key}: {value}" for key, value in found.items()]):
            sys.stdout.write(f"{line}\n")


def quieten() -> None:
    """Libraries' remarks are for programmers; who wants them sets these variables."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)


# --- what the commands do: each answers what --json prints ---


def generate(arguments: argparse.Namespace) -> dict[str, Any]:
    from lib_layerdiffuse.studio import Job

    given = {name: getattr(arguments, name) for name in FORM.names if name not in NOT_HERE}
    request = (
        None
        if arguments.plain
        else Request.parse([{name: value for name, value in given.items() if value is not None}])
    )
    studio = open_studio(arguments, request.method.family if request else Family(arguments.family))
    size = (arguments.width, arguments.height)
    width, height = (side or studio.host.usual_size for side in size)
    usual_cfg = USUAL_CFG if arguments.model else WORLD_CFG
    job = Job(
        arguments.prompt,
        arguments.negative,
        arguments.seed,
        arguments.count,
        width,
        height,
        arguments.steps,
        usual_cfg if arguments.cfg is None else arguments.cfg,
        arguments.sampler,
        [Image.open(path) for path in arguments.init or ()],
        arguments.strength,
    )
    folder = Path(arguments.output)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for index, together in enumerate(studio.run(request, job)):
        for made in together:
            layer = made.layer.value if made.layer else None
            number = f"{job.seed + index * len(together):06}"
            path = folder / (f"{number}-{layer}.png" if layer else f"{number}.png")
            made.image.save(path)
            pictures.append({"file": str(path), "layer": layer, "picture": index})
            if arguments.latents:
                save_latent(path.with_suffix(".safetensors"), made.latent)
    return {"files": [row["file"] for row in pictures], "pictures": pictures}


def encode(arguments: argparse.Namespace) -> dict[str, Any]:
    studio = open_studio(arguments, Family(arguments.family))
    with Image.open(arguments.picture) as image:
        latent = studio.encode(image)
    save_latent(arguments.latent, latent)
    return {"files": [str(arguments.latent)], "shape": list(latent.shape)}


def decode(arguments: argparse.Namespace) -> dict[str, Any]:
    from safetensors.torch import load_file

    studio = open_studio(arguments, Family(arguments.family))
    latent = load_file(arguments.latent)["latent"]
    painted = from_pil(Image.open(arguments.painted).convert("RGB"))[None] if arguments.painted else None
    to_pil(studio.decode(latent, painted, arguments.passes)[0]).save(arguments.picture)
    return {"files": [str(arguments.picture)]}


def compose(arguments: argparse.Namespace) -> dict[str, Any]:
    foreground, background = Image.open(arguments.foreground), Image.open(arguments.background)
    if foreground.size != background.size:
        raise LayerDiffuseError(
            f"{arguments.foreground} has {foreground.width}x{foreground.height} pixels and {arguments.background} "
            f"{background.width}x{background.height}. Make them of one size."
        )
    over(foreground, background).save(arguments.blend)
    return {"files": [str(arguments.blend)]}


def metrics(arguments: argparse.Namespace) -> dict[str, Any]:
    from lib_layerdiffuse.metrics import compare_folders

    return compare_folders(arguments.truth, arguments.result, arguments.lpips)


def open_studio(arguments: argparse.Namespace, family: Family) -> Any:
    """The model that was asked for with its weights: the tiny world, whose files lie here, or any other."""
    import torch

    from lib_layerdiffuse.hosts.diffusers import DiffusersHost
    from lib_layerdiffuse.studio import Studio

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    precision = torch.float16 if device.startswith("cuda") else torch.float32
    if arguments.model is None:
        studio = open_world(family)
    else:
        host = DiffusersHost.load(arguments.model, family, torch_dtype=precision, **config_of(arguments))
        studio = Studio(host, obtainer([arguments.weights]))
    studio.host.pipeline.to(device)
    studio.host.pipeline.set_progress_bar_config(disable=arguments.json)
    return studio


def open_world(family: Family) -> Any:
    """The tiny world, whose families have one VAE, and so one transparent pair."""
    from lib_layerdiffuse.hosts.diffusers import DiffusersHost
    from lib_layerdiffuse.studio import Studio

    of_all = {names[each]: names[Family.SDXL] for names in (ENCODERS, DECODERS) for each in Family}
    return Studio(DiffusersHost.load_world(WORLD, family), lambda file: WORLD / "weights" / of_all.get(file, file))


def obtainer(folders: Sequence[Path]) -> Callable[[str], Path]:
    """Finds weight files, and downloads what is missing with a progress bar."""
    from tqdm import tqdm

    from lib_layerdiffuse.library import WeightLibrary

    library = WeightLibrary(folders)

    def obtain(file: str) -> Path:
        with tqdm(desc=file, unit="B", unit_scale=True, disable=library.find(file) is not None) as bar:

            def report(received: int, total: int) -> None:
                bar.total = total
                bar.update(received - bar.n)

            return library.obtain(file, report)

    return obtain


def config_of(arguments: argparse.Namespace) -> dict[str, Any]:
    return {"config": arguments.config} if arguments.config else {}


def save_latent(path: Path, latent: Any) -> None:
    """In VAE space (unscaled)."""
    from safetensors.torch import save_file

    save_file({"latent": latent.contiguous().cpu()}, path)


# --- the command line ---


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print what was done as JSON, and no progress")
    common.add_argument("--verbose", action="store_true", help="say what is going on")
    model = argparse.ArgumentParser(add_help=False, parents=[common])
    model.add_argument(
        "--model", help="a diffusers folder, a single SD1.5 or SDXL file, or a hub name; default: the tiny world"
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

    top = argparse.ArgumentParser(
        prog="lib_layerdiffuse", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(
        run: Callable[[argparse.Namespace], dict[str, Any]], about: str, *parents: argparse.ArgumentParser
    ) -> Any:
        one = commands.add_parser(run.__name__, help=about, description=about, parents=list(parents))
        one.set_defaults(run=run)
        return one

    add_generate(command(generate, "make transparent pictures and layers", model))
    encoding = command(encode, "a picture with its transparency -> a latent", model)
    encoding.add_argument("picture", type=Path)
    encoding.add_argument("latent", type=Path)
    decoding = command(decode, "a latent -> a picture with its transparency", model)
    decoding.add_argument("latent", type=Path)
    decoding.add_argument("picture", type=Path)
    decoding.add_argument("--painted", type=Path, help="what the model's VAE shows of it; default: computed")
    decoding.add_argument("--passes", type=int, default=8, choices=PASSES)
    composing = command(compose, "a foreground over a background", common)
    for name in ("foreground", "background", "blend"):
        composing.add_argument(name, type=Path)
    comparing = command(metrics, "how close transparent pictures come to others", common)
    comparing.add_argument("truth", type=Path)
    comparing.add_argument("result", type=Path)
    comparing.add_argument("--lpips", action="store_true", help="needs the network at its first use")
    return top


def add_generate(making: argparse.ArgumentParser) -> None:
    making.add_argument("--prompt", required=True)
    making.add_argument("--negative", default="", help="what should not be seen")
    making.add_argument("--output", default="layerdiffuse", help="folder; default: %(default)s")
    making.add_argument("--seed", type=int, default=0)
    making.add_argument("--count", type=int, default=1, help="how many pictures, each with all its layers")
    making.add_argument("--width", type=int, help="in pixels; default: what the model is used to")
    making.add_argument("--height", type=int)
    making.add_argument("--steps", type=int, default=25)
    making.add_argument("--cfg", type=float, help=f"default: {USUAL_CFG:g}, for the tiny world {WORLD_CFG:g}")
    making.add_argument("--sampler", default="Euler a")
    making.add_argument(
        "--init", type=Path, action="append", help="img2img: a picture to start from; several are taken in turn"
    )
    making.add_argument("--strength", type=float, default=0.75, help="of img2img, up to 1")
    making.add_argument("--latents", action="store_true", help="save latents beside the pictures")
    making.add_argument("--plain", action="store_true", help="without LayerDiffuse")
    for name in FORM.names:
        if name not in NOT_HERE:
            making.add_argument(f"--{name.replace('_', '-')}", help=FORM.hint(name), **kind_of(name))


def kind_of(name: str) -> dict[str, Any]:
    """How the command line takes a control; None where it is not given."""
    if FORM.default(name) is False:
        return {"action": "store_true", "default": None}
    return {"type": Image.open} if name.endswith("_image") else {}


if __name__ == "__main__":
    main()
