"""What is shown and what is saved, under which name and format. PIL images at their rim; nothing of a host."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lib_layerdiffuse.images.extras import EXTRAS
from lib_layerdiffuse.images.rgba import (
    GREY,
    SMALLEST_ALPHA,
    Box,
    ResizeMode,
    fit,
    flattened,
    from_pil,
    to_pil,
)
from lib_layerdiffuse.methods import Layer
from lib_layerdiffuse.tensors import Rgb

# Formats whose files, as web UIs write them, give back the same pixels and alpha: they turn RGBA into RGB for JPG and
# WebP, and compress AVIF with loss.
LOSSLESS = (".png",)


@dataclass(frozen=True)
class Picture:
    """What belongs to a finished picture: what the host made of the same latent, and what else is wanted beside it."""

    opaque: Image.Image
    extras: Mapping[str, Image.Image]
    name: str = ""  # what its file's name ends with, where other pictures belong to it


# What an infotext says of a picture: its layer, where several belong together, and which of the extras it is.
LAYER_KEY, EXTRA_KEY = "LayerDiffuse shows", "LayerDiffuse extra"


def host_pixels(pixels: Rgb) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """One picture's pixels [3, H, W] as the host turns them into 8 bits (cut off, not rounded) -> [H, W, 3]."""
    return (255.0 * np.moveaxis(pixels.cpu().numpy(), 0, 2)).astype(np.uint8)


def transparent(decoded: Image.Image, expected: Image.Image, shown: Image.Image) -> Image.Image:
    """The decoded picture (RGBA), with the host's colour where somebody edited the picture meanwhile.

    expected: what the host would show of it by itself (RGB); shown: what it shows, of any size and mode. Both are over
    the middle grey, which is taken off again.
    """
    colour = shown.convert("RGB")
    if colour.size != decoded.size:  # enlarged since: all its colour is new
        colour.putalpha(decoded.getchannel("A").resize(colour.size, Image.Resampling.LANCZOS))
        return off_grey(colour)
    edited = (np.asarray(colour) != np.asarray(expected)).any(axis=2)
    if not edited.any():
        return decoded
    colour.putalpha(decoded.getchannel("A"))
    return Image.fromarray(np.where(edited[:, :, None], np.asarray(off_grey(colour)), np.asarray(decoded)))


def off_grey(picture: Image.Image) -> Image.Image:
    """The RGBA picture that looks over the middle grey as the colours of this one (RGBA) do by themselves."""
    seen, alpha = from_pil(picture).split([3, 1])
    premultiplied = (seen - GREY * (1 - alpha)).clamp(min=0).minimum(alpha)
    return to_pil(torch.cat([premultiplied / alpha.clamp(min=SMALLEST_ALPHA), alpha]))


def one_overlay(overlay: Any) -> Image.Image | None:
    """What a host lays over a picture, as an RGBA.

    Neo may have a pair: the original, and how much of the picture is seen, 0 to 1 (its `img2img_inpaint_precise_mask`).
    """
    if not isinstance(overlay, tuple):
        return overlay
    original, seen = overlay
    rgba = original.convert("RGB")
    rgba.putalpha(Image.fromarray((255 * (1 - seen)).round().astype(np.uint8)))
    return rgba


def placed(picture: Image.Image, region: Box, width: int, height: int) -> Image.Image:
    """The picture (RGBA) in that region of an empty one, as hosts put back what they sampled enlarged."""
    left, upper, right, lower = region
    whole = Image.new("RGBA", (width, height))
    whole.paste(fit(picture, ResizeMode.CROP_AND_RESIZE, right - left, lower - upper), (left, upper))
    return whole


def mark(image: Image.Image, picture: Picture | None = None, caption: str = "", infotext: str = "") -> Image.Image:
    """Mark `image` as ours, with what belongs to it: the mark goes with the object, not with a copy or a file."""
    image.layerdiffuse = picture  # type: ignore[attr-defined]
    image.layerdiffuse_caption = caption  # type: ignore[attr-defined]
    return with_infotext(image, infotext)


def with_infotext(image: Image.Image, infotext: str) -> Image.Image:
    """For a picture that has no place among the web UI's own infotexts."""
    image.layerdiffuse_infotext = infotext  # type: ignore[attr-defined]
    return image


def infotext_of(image: Any) -> str:
    return getattr(image, "layerdiffuse_infotext", "")


def caption_of(image: Any) -> str:
    """What a picture of ours shows, where that needs saying."""
    return getattr(image, "layerdiffuse_caption", "")


def is_marked(image: Any) -> bool:
    return hasattr(image, "layerdiffuse")


def picture_of(image: Any) -> Picture | None:
    """The Picture that belongs to `image`, if it is one of ours."""
    return getattr(image, "layerdiffuse", None)


def opaque_of(image: Image.Image) -> Image.Image:
    """What to show of the image where no transparency is possible: it would be shown with its hidden colours."""
    picture = picture_of(image)
    return picture.opaque.resize(image.size) if picture else flattened(image)


def text_of_extra(infotext: str, name: str) -> str:
    """The infotext of an extra of a picture with this one."""
    return f"{infotext}, {EXTRA_KEY}: {name}"


def ending(infotext: str) -> str:
    """What the name of a file ends with for a picture with this infotext: those that belong together share a seed."""
    layer, extra = (
        found[1] if (found := re.search(rf"\b{key}: (\w+)", infotext)) else "" for key in (LAYER_KEY, EXTRA_KEY)
    )
    return dashed(*(each.value for each in Layer if each.word == layer), extra)


def dashed(*names: str) -> str:
    return "".join(f"-{name}" for name in names if name)


RESERVED = max((f"-{name}" for name in EXTRAS), key=len)


def named(path: Path, ending: str, fits: Callable[[Path], bool]) -> Path:
    """The path, its name ending as said before the extension; what is too long is cut off before that.

    fits: whether the host and the system take a path as it is. The names of extras, derived from this one, fit too. A
    name that was cut is none of a file that is there.
    """
    stem = path.stem
    while stem and not fits(path.with_stem(stem + ending + RESERVED)):
        stem = stem[:-1]
    number, name = 0, path.with_stem(stem + ending)
    while stem != path.stem and name.exists():
        number += 1
        name = path.with_stem(f"{stem[: -len(str(number)) - 1]}-{number}{ending}")
    return name


def lossless_name(path: Path) -> Path:
    """The path under which an RGBA keeps all of its pixels."""
    return path if path.suffix.lower() in LOSSLESS else path.with_suffix(LOSSLESS[0])
