"""Latents in files: safetensors, in VAE space (unscaled)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lib_layerdiffuse.cli.files import reading
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.reading import MAX_PIXELS
from lib_layerdiffuse.methods import Family
from lib_layerdiffuse.tensors import Latent
from lib_layerdiffuse.vae import LATENT_STRIDE

ENDING = ".safetensors"
KEY = "latent"
FLOATS = ("F", "BF")  # how the names of these types begin
TENSORS_SHOWN = 3


def content_of(latent: Latent) -> bytes:
    return save({KEY: latent.contiguous().cpu()})


def read(path: Path, family: Family) -> Latent:
    """All latents of a file, for a model of that family, float32. Raises LayerDiffuseError where it has none.

    Under our key or, from other programs (`samples`, `latent_tensor`), under whatever key one tensor of that shape has.
    """
    try:
        with reading(path), safe_open(path, "pt") as file:
            latent = file.get_tensor(key_of(file, path, family.channels)).float()
    except SafetensorError as error:
        raise LayerDiffuseError(f"{path} is no safetensors file, or is not whole: {error}.") from error
    if not latent.isfinite().all():
        raise LayerDiffuseError(f"{path} has a latent with values that are no numbers (NaN or infinite).")
    return latent


def key_of(file: Any, path: Path, channels: int) -> str:
    slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  # no mapping
    found = {key: (tuple(each.get_shape()), each.get_dtype()) for key, each in slices.items()}
    fitting = [key for key, (shape, kind) in found.items() if is_latent(shape, channels) and kind.startswith(FLOATS)]
    if KEY in fitting:
        return KEY
    if len(fitting) == 1:
        return fitting[0]
    shown = ", ".join(f"{key} {shape} {kind}" for key, (shape, kind) in list(found.items())[:TENSORS_SHOWN])
    raise LayerDiffuseError(
        f"{path} should have one tensor of floats (pictures, {channels}, height / {LATENT_STRIDE}, width / "
        f"{LATENT_STRIDE}), or one of them called {KEY}. It has {len(fitting)} among {len(found)}: {shown}."
    )


def is_latent(shape: Sequence[int], channels: int) -> bool:
    """Of some pictures, none of which is too large."""
    return (
        len(shape) == 4
        and min(shape) > 0
        and shape[1] == channels
        and shape[2] * shape[3] * LATENT_STRIDE**2 <= MAX_PIXELS
    )
