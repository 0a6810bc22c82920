"""The models that commands work with: the tiny world, whose files lie here, or any other with its weights."""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.methods import Family

WORLD = Path(__file__).parent.parent / "world"
WORLD_CFG, USUAL_CFG = 3.0, 7.0


def quieten() -> None:
    """Libraries' remarks are for programmers; who wants them sets these variables. Before they are imported."""
    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning)


def open_runner(arguments: argparse.Namespace, family: Family) -> Any:
    """The model that was asked for, with what finds its weights. Raises LayerDiffuseError."""
    import torch

    from lib_layerdiffuse.engine.diffusers import DiffusersBackend
    from lib_layerdiffuse.engine.runner import Runner

    device = device_of(arguments.device)
    if arguments.json:
        hide_progress()
    if arguments.model is None:
        runner = open_world(family)
    else:
        precision = torch.float16 if device.startswith("cuda") else torch.float32
        config = {"config": arguments.config} if arguments.config else {}
        backend = DiffusersBackend.load(arguments.model, family, torch_dtype=precision, **config)
        runner = Runner(backend, obtainer([arguments.weights], hidden=arguments.json))
    runner.backend.pipeline.to(device)
    runner.backend.pipeline.set_progress_bar_config(disable=arguments.json)
    return runner


def open_world(family: Family) -> Any:
    """The tiny world, whose families have one VAE, and so one transparent pair."""
    from lib_layerdiffuse.engine.diffusers import DiffusersBackend
    from lib_layerdiffuse.engine.runner import Runner

    of_all = {getattr(each, net): getattr(Family.SDXL, net) for net in ("encoder", "decoder") for each in Family}
    return Runner(DiffusersBackend.load_world(WORLD, family), lambda file: WORLD / "weights" / of_all.get(file, file))


def device_of(name: str | None) -> str:
    """The device of that name, or the usual one. Raises LayerDiffuseError where nothing can be computed on it."""
    import torch

    usual = "cuda" if torch.cuda.is_available() else "cpu"
    if name is None:
        return usual
    try:
        torch.zeros(1, device=name).item()
    except (AssertionError, ImportError, RuntimeError) as error:  # torch has one for each kind of device
        raise LayerDiffuseError(
            f"There is no device {name!r} that torch can use here. Leave out --device for {usual}, or name another."
        ) from error
    return name


def hide_progress() -> None:
    """That of reading models; each library has its own."""
    for library in ("diffusers", "transformers"):
        import_module(f"{library}.utils.logging").disable_progress_bar()
    import_module("huggingface_hub.utils").disable_progress_bars()


def obtainer(folders: Sequence[Path], hidden: bool = False) -> Callable[[str], Path]:
    """Finds weight files, and downloads what is missing with a progress bar, unless it is to be hidden."""
    from tqdm import tqdm

    from lib_layerdiffuse.weights.library import WeightLibrary

    library = WeightLibrary(folders)

    def obtain(file: str) -> Path:
        here = library.find(file) is not None
        with tqdm(desc=file, unit="B", unit_scale=True, disable=hidden or here) as bar:

            def report(received: int, total: int) -> None:
                bar.total = total
                bar.update(received - bar.n)

            return library.obtain(file, report)

    return obtain
