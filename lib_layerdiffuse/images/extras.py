"""Pictures that go beside a finished one, each made of what belongs together."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from PIL import Image

from lib_layerdiffuse.images.rgba import checkerboard, over, to_pil
from lib_layerdiffuse.methods import Layer

RGBA, OPAQUE = "rgba", "opaque"  # a decoded picture, and what it was decoded from


@dataclass(frozen=True)
class Extra:
    """A picture that goes beside another: its name in the settings, what it is made of, and whether JPG may hold it."""

    label: str
    caption: str
    needs: tuple[str, ...]  # RGBA, OPAQUE, or a layer; it is made where all are there
    make: Callable[..., Image.Image]
    lossy: bool


def on_checkerboard(rgba: Image.Image) -> Image.Image:
    board = to_pil(checkerboard(rgba.height, rgba.width)[0])
    return Image.composite(rgba.convert("RGB"), board, rgba.getchannel("A"))


EXTRAS: Mapping[str, Extra] = {
    "opaque": Extra("Opaque picture, as the model painted it", "opaque", (OPAQUE,), lambda opaque: opaque, lossy=True),
    "mask": Extra("Alpha mask", "alpha mask", (RGBA,), lambda rgba: rgba.getchannel("A"), lossy=False),
    "preview": Extra("Preview on a checkerboard", "on a checkerboard", (RGBA,), on_checkerboard, lossy=True),
    "composed": Extra(
        "Foreground composed over the background, pixel by pixel",
        "foreground over background",
        (Layer.FG.value, Layer.BG.value),
        over,
        lossy=True,
    ),
}


def make_extras(sources: Mapping[str, Image.Image], wanted: Collection[str]) -> dict[str, Image.Image]:
    """Those that are wanted and can be made, in the order of EXTRAS, whatever the order of `wanted`."""
    return {
        name: extra.make(*(sources[need] for need in extra.needs))
        for name, extra in EXTRAS.items()
        if name in wanted and sources.keys() >= set(extra.needs)
    }
