"""What the commands do: each answers what --json prints."""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from lib_layerdiffuse.cli import files, latents
from lib_layerdiffuse.cli.arguments import CONTROLS, parser
from lib_layerdiffuse.cli.files import FOR_OPAQUE, LOSSLESS, check_folder, check_target
from lib_layerdiffuse.cli.models import USUAL_CFG, WORLD_CFG, open_runner, quieten
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.reading import read_file
from lib_layerdiffuse.images.rgba import from_pil, has_alpha, over, to_pil
from lib_layerdiffuse.methods import METHODS, Family, Layer
from lib_layerdiffuse.request.advice import alpha_note, notes
from lib_layerdiffuse.request.layers import Request
from lib_layerdiffuse.tensors import Latent, Rgb
from lib_layerdiffuse.vae import LATENT_STRIDE

ANOTHER_SEED = -1  # as web UIs ask for it
USUAL_SEEDS = 2**32  # of web UIs
TRANSPARENT = "a picture with transparency"


def run(words: Sequence[str] | None) -> None:
    arguments = parser(
        {each.__name__: each for each in (methods, generate, encode, decode, compose, metrics)}
    ).parse_args(words)
    quieten()
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(message)s")
    found = arguments.run(arguments)
    for note in found.get("notes", ()):
        say(sys.stderr, f"Note: {note}")
    if arguments.json:
        say(sys.stdout, json.dumps(found, indent=1))
        return
    for line in found.get("files", [f"{key}: {value}" for key, value in found.items()]):
        say(sys.stdout, line)


def say(stream: TextIO, line: str) -> None:
    """Also where the terminal has no letters for a file's name."""
    encoding = stream.encoding or "utf-8"
    stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")


def methods(arguments: argparse.Namespace) -> dict[str, Any]:
    return {method.key: method.full_title for method in METHODS}


def generate(arguments: argparse.Namespace) -> dict[str, Any]:
    from lib_layerdiffuse.engine.diffusers import SAMPLERS
    from lib_layerdiffuse.engine.runner import check_task

    request, task = request_of(arguments), task_of(arguments)
    check_task(task, request, SAMPLERS)
    check_folder(arguments.output)
    runner = open_runner(arguments, request.method.family if request else Family(arguments.family))
    made = runner.run(request, task)
    pictures = [
        row | {"picture": index}
        for index, together in enumerate(made)
        for row in saved(together, arguments.output, arguments.latents)
    ]
    return {
        "files": [row["file"] for row in pictures],
        "pictures": pictures,
        "notes": list(dict.fromkeys(notes_of(request, made, task.sampler))),
    }


def request_of(arguments: argparse.Namespace) -> Request | None:
    if arguments.plain:
        return None
    given = {name: getattr(arguments, name) for name in CONTROLS}
    return Request.parse([{name: value for name, value in given.items() if value is not None}])


def task_of(arguments: argparse.Namespace) -> Any:
    from lib_layerdiffuse.engine.runner import Task

    usual_cfg = USUAL_CFG if arguments.model else WORLD_CFG
    return Task(
        arguments.prompt,
        arguments.negative,
        random.randrange(USUAL_SEEDS) if arguments.seed == ANOTHER_SEED else arguments.seed,
        arguments.count,
        arguments.width,
        arguments.height,
        arguments.steps,
        usual_cfg if arguments.cfg is None else arguments.cfg,
        arguments.sampler,
        [read_file(path) for path in arguments.init or ()],
        arguments.strength,
    )


def saved(together: Sequence[Any], folder: Path, with_latents: bool) -> list[dict[str, Any]]:
    """The pictures that belong together, under one name: that of the seed that makes them again."""
    endings = [f"-{made.layer.value}" if made.layer else "" for made in together]
    contents = {f"{end}.png": files.content_of(made.image, ".png") for end, made in zip(endings, together)}
    if with_latents:
        contents |= {f"{end}{latents.ENDING}": latents.content_of(made.latent) for end, made in zip(endings, together)}
    paths = files.write_free(folder, f"{together[0].seed:06}", contents)
    return [
        {"file": str(path), "layer": made.layer and made.layer.value, "seed": made.seed}
        for path, made in zip(paths, together)
    ]


def notes_of(request: Request | None, made: Sequence[Sequence[Any]], sampler: str) -> Iterator[str]:
    if request is None:
        return
    width, height = made[0][0].image.size
    yield from notes(request, width, height, sampler)
    for together in made:
        for each in together:
            if each.layer is Layer.FG and (note := alpha_note(each.image)):
                yield note


def encode(arguments: argparse.Namespace) -> dict[str, Any]:
    from lib_layerdiffuse.engine.runner import check_picture

    check_target(arguments.latent, [latents.ENDING], "a latent", arguments.overwrite)
    image = read_file(arguments.picture)
    check_picture(image)
    latent = open_runner(arguments, Family(arguments.family)).encode(image)
    files.write({arguments.latent: latents.content_of(latent)}, arguments.overwrite)
    return {"files": [str(arguments.latent)], "shape": list(latent.shape)}


def decode(arguments: argparse.Namespace) -> dict[str, Any]:
    latent = latents.read(arguments.latent, Family(arguments.family))
    targets = numbered(arguments.picture, len(latent))
    for target in targets:
        check_target(target, LOSSLESS, TRANSPARENT, arguments.overwrite)
    painted = painted_of(arguments.painted, latent) if arguments.painted else None
    runner = open_runner(arguments, Family(arguments.family))
    images = [to_pil(runner.decode(one, painted, arguments.passes)[0]) for one in latent.split(1)]
    contents = {target: files.content_of(image, target.suffix) for target, image in zip(targets, images)}
    files.write(contents, arguments.overwrite)
    return {"files": list(map(str, targets))}


def painted_of(path: Path, latent: Latent) -> Rgb:
    image = read_file(path).convert("RGB")
    height, width = (LATENT_STRIDE * side for side in latent.shape[2:])
    if len(latent) > 1 or image.size != (width, height):
        raise LayerDiffuseError(
            f"{path} has {image.width}x{image.height} pixels, and the file of latents has {len(latent)} of "
            f"{width}x{height}. Name the picture of a latent that is alone in its file, or leave out --painted."
        )
    return from_pil(image)[None]


def numbered(path: Path, count: int) -> list[Path]:
    """The path, or for several files one for each."""
    return [path.with_stem(f"{path.stem}-{number}") for number in range(1, count + 1)] if count > 1 else [path]


def compose(arguments: argparse.Namespace) -> dict[str, Any]:
    foreground, background = read_file(arguments.foreground), read_file(arguments.background)
    transparent = has_alpha(background)
    formats = LOSSLESS if transparent else FOR_OPAQUE
    check_target(arguments.blend, formats, TRANSPARENT if transparent else "a picture", arguments.overwrite)
    if foreground.size != background.size:
        raise LayerDiffuseError(
            f"{arguments.foreground} has {foreground.width}x{foreground.height} pixels and {arguments.background} "
            f"{background.width}x{background.height}. Make them of one size."
        )
    blend = files.content_of(over(foreground, background), arguments.blend.suffix, formats)
    files.write({arguments.blend: blend}, arguments.overwrite)
    return {"files": [str(arguments.blend)]}


def metrics(arguments: argparse.Namespace) -> dict[str, Any]:
    from lib_layerdiffuse.cli.metrics import compare_folders

    if arguments.lpips and not find_spec("torchvision"):
        raise LayerDiffuseError("--lpips needs torchvision, which is not installed: pip install torchvision")
    return compare_folders(arguments.truth, arguments.result, arguments.lpips)
