"""Colour profiles (ICC): what the numbers of a picture mean, turned into sRGB, which they mean everywhere else."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from PIL import Image

log = logging.getLogger("layerdiffuse")

Conversion: TypeAlias = Callable[[Image.Image], Image.Image]

MODES = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # of the colour spaces that files are in
BLACK_POINT_COMPENSATION = 0x2000  # LittleCMS's number; Pillow 9.5 has no name for it
ROUNDING = 1  # of 255: profiles of sRGB itself come that near to one another
STEPS = np.linspace(0, 255, 9).round().astype(np.uint8)
COLOURS = np.stack(np.meshgrid(STEPS, STEPS, STEPS), axis=-1).reshape(1, -1, 3)  # from black to white


def to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """An opaque picture (L, RGB or CMYK) as L or RGB: by its profile, or as Pillow sees it where that is of no use."""
    plain = picture.convert("RGB") if picture.mode == "CMYK" else picture
    if not profile:
        return plain
    try:
        convert = conversion(profile, picture.mode)
        return plain if convert is None else convert(picture)
    except Exception as error:  # many of LittleCMS, as of damaged profiles; ImportError of a Pillow without it
        log.warning("The colour profile of a picture was not used: %s.", error)
        return plain


def conversion(profile: bytes, mode: str) -> Conversion | None:
    """Into RGB, for pictures of that mode; None where that changes nothing, as from sRGB.

    Raises ValueError where the profile is not for such pictures, or absurd.
    """
    from PIL import ImageCms

    given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = given.profile.xcolor_space
    if MODES.get(space) not in (mode, "RGB" if mode == "L" else mode):
        raise ValueError(f"it is for {space.strip()}, not for {mode}")
    transform = ImageCms.buildTransform(
        given,
        ImageCms.createProfile("sRGB"),
        MODES[space],
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,  # as image editors do
        flags=BLACK_POINT_COMPENSATION,  # type: ignore[arg-type]
    )

    def convert(picture: Image.Image) -> Image.Image:
        converted = ImageCms.applyTransform(picture.convert(MODES[space]), transform)
        assert converted is not None  # as it is where a picture is changed in place
        return converted

    sample = Image.fromarray(COLOURS).convert(MODES[space])
    before, after = (np.asarray(each).astype(int)[0] for each in (sample.convert("RGB"), convert(sample)))
    if after[0].max() > 127 or after[-1].min() < 128:
        raise ValueError(f"it takes white for {after[-1].tolist()} and black for {after[0].tolist()}")
    return None if abs(after - before).max() <= ROUNDING else convert
