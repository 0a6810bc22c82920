"""Differential Diffusion: how much each pixel may change, in a map; of a picture with or without transparency.

Levin and Fried, arXiv 2306.00950. White is change here, as in inpaint masks; in the paper's maps, white is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from torch import Tensor

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.rgba import content_hash
from lib_layerdiffuse.methods import listed
from lib_layerdiffuse.request.form import IMAGE_NEEDS, Form, control, flag, image, integer, number

TITLE = "Differential Diffusion"
HALF_A_LEVEL = 0.5 / 255  # of the 256 that a map has
WORTH_A_NOTE = 0.1  # of what is not black in a map
STRIP = 12  # pixels of height that the default font of Pillow needs, with a margin


@dataclass(frozen=True)
class Given:
    """What a map can be made of. All pictures have the size of `init`; mask and upload are of mode L."""

    init: Image.Image  # the picture that img2img starts from, RGBA
    mask: Image.Image | None  # 255 where it is to be painted over
    upload: Image.Image | None
    softness: float  # pixels
    columns: int


def _uploaded(given: Given) -> Image.Image:
    if given.upload is None:
        raise LayerDiffuseError(
            f"{TITLE} has no change map. Put one into the {FORM.label('map_image')} box, send it as map_image, or "
            f"choose another source ({FORM.label('source')})."
        )
    return given.upload


def _masked(given: Given) -> Image.Image:
    if given.mask is None:
        raise LayerDiffuseError(
            f'{TITLE} takes its change map from the inpaint mask ("{MASK}"), but there is none. '
            "Draw one in the Inpaint tab, send one as mask, or choose another source."
        )
    return softened(given.mask, given.softness)


def _alpha(curve: Callable[[np.ndarray], np.ndarray]) -> Callable[[Given], Image.Image]:
    """A map from the softened alpha, `curve` of which says how much changes."""

    def make(given: Given) -> Image.Image:
        alpha = given.init.getchannel("A")
        if alpha.getextrema() == (255, 255):
            raise LayerDiffuseError(
                f"{TITLE} takes its change map from the transparency of the picture, which has none. "
                "Start from a picture with transparency, or choose another source."
            )
        values = curve(np.asarray(softened(alpha, given.softness), np.float32) / 255)
        return Image.fromarray((255 * values.clip(0, 1)).round().astype(np.uint8))

    return make


def _fan(given: Given) -> Image.Image:
    """Columns from the weakest change to the full one."""
    column = np.arange(given.init.width) * given.columns // given.init.width
    values = fan_values(given.columns)[column]
    return Image.fromarray(np.broadcast_to(values, (given.init.height, given.init.width)).copy())


def fan_values(columns: int) -> np.ndarray:
    """The map's value in each column, up to white."""
    return np.ceil(255 * np.arange(1, columns + 1) / columns).astype(np.uint8)


UPLOAD, MASK, FAN = "Uploaded map", "Inpaint mask", "Strength fan"

# Softened, an alpha is 0.5 along the edge, and nearly 0 and 1 at the distance that the softness says.
SOURCES: Mapping[str, Callable[[Given], Image.Image]] = {
    UPLOAD: _uploaded,
    MASK: _masked,
    "Alpha: edges": _alpha(lambda alpha: 1 - abs(2 * alpha - 1)),
    "Alpha: inside": _alpha(lambda alpha: 2 * alpha - 1),
    "Alpha: outside": _alpha(lambda alpha: 1 - 2 * alpha),
    FAN: _fan,
}


def uses(source: str) -> dict[str, bool]:
    """Of each control that not all sources need: whether this one does."""
    return {"map_image": source == UPLOAD, "softness": source not in (UPLOAD, FAN), "columns": source == FAN}


def _source(raw: object) -> str:
    return {name.casefold(): name for name in SOURCES}[str(raw).casefold()]


@dataclass(frozen=True)
class ChangeFields:
    """Raw values, as the panel and the API send them; the order of the fields is the order of both."""

    enabled: object = control("Enable", False, flag, "true or false")
    source: object = control(
        "Change Map",
        next(iter(SOURCES)),
        _source,
        listed(SOURCES),
        infotext=TITLE,
        hint="Where the strength of each pixel comes from.",
    )
    map_image: object = control(
        "Map",
        None,
        image,
        IMAGE_NEEDS,
        hint="White changes, black stays (in the paper it is the other way round). Brought to the picture's size.",
    )
    softness: object = control(
        "Softness",
        16,
        number(0, 256),
        "a number of pixels from 0 to 256",
        infotext=f"{TITLE} softness",
        hint="Over how many pixels the change fades out.",
    )
    columns: object = control(
        "Columns",
        5,
        integer(2, 16),
        "a whole number from 2 to 16",
        infotext=f"{TITLE} columns",
        hint="How many strengths there are side by side.",
    )


FORM = Form(TITLE, ChangeFields, {}, {})


@dataclass(frozen=True)
class Change:
    """What is asked of a job, checked."""

    source: str
    upload: Image.Image | None
    softness: float
    columns: int

    @classmethod
    def parse(cls, args: Sequence[object]) -> Change | None:
        """From one value per control, or one dict of names; None when off. Raises LayerDiffuseError."""
        values = FORM.read(args, {})
        if values is None:
            return None
        return cls(values["source"], values["map_image"], values["softness"], values["columns"])

    @property
    def infotext(self) -> dict[str, object]:
        used = {"source": True, **uses(self.source)}
        values = {"source": self.source, "softness": self.softness, "columns": self.columns}
        text: dict[str, object] = {FORM.infotext(name): value for name, value in values.items() if used[name]}
        if self.upload and used["map_image"]:
            text[f"{TITLE} map image"] = content_hash(self.upload)
        return text

    def map(self, init: Image.Image, mask: Image.Image | None) -> Image.Image:
        """How much of `init` (any mode) changes, where: mode L, 255 is all of it. A mask limits other sources.

        Raises LayerDiffuseError where there is nothing to make a map of, or nothing would change.
        """
        upload = self.upload and on_black(self.upload).convert("L").resize(init.size)
        mask = mask and mask.resize(init.size)
        made = SOURCES[self.source](Given(init.convert("RGBA"), mask, upload, self.softness, self.columns))
        if mask and self.source != MASK:
            made = ImageChops.multiply(made, mask)
        if not made.getbbox():
            raise LayerDiffuseError(
                f'The change map ("{self.source}") is black all over: nothing would change. '
                "White is what changes. More softness widens the edges of an alpha."
            )
        return made

    @property
    def fans(self) -> bool:
        """Whether its columns are there to choose a strength by."""
        return self.source == FAN

    def strengths(self, denoising_strength: float, steps: int) -> list[float]:
        """That each column of a strength fan really has: there is one for each step, and none."""
        free = free_steps_of_values(steps)
        return [denoising_strength * free[value] / steps for value in fan_values(self.columns)]

    def notes(self, change: Image.Image, steps: int) -> Iterator[str]:
        """Sentences about what so many steps of sampling cannot tell apart in the map."""
        free = free_steps_of_values(steps)
        remedy = "More steps or a higher denoising strength make it finer."
        if self.fans:
            results = {free[value] for value in fan_values(self.columns)}
            if len(results) < self.columns:
                yield (
                    f"{TITLE}: {steps} steps of sampling make {len(results)} different results of {self.columns} "
                    f"columns; those with the same number are alike. {remedy}"
                )
        elif self.source == UPLOAD:
            counts = change.histogram()[1:]
            kept = sum(count for count, steps_free in zip(counts, free[1:]) if not steps_free)
            if kept > WORTH_A_NOTE * sum(counts):
                darkest = next(value for value, steps_free in enumerate(free) if steps_free)
                yield (
                    f"{TITLE}: in {steps} steps of sampling nothing changes where the map is darker than {darkest} of "
                    f"255, which is {kept / sum(counts):.0%} of what is not black in it. {remedy}"
                )


def on_black(upload: Image.Image) -> Image.Image:
    """A map's transparent parts change nothing."""
    rgba = upload.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba)


def softened(mask: Image.Image, pixels: float) -> Image.Image:
    """Its edges spread over so many pixels to both sides: two deviations of a Gaussian."""
    return mask.filter(ImageFilter.GaussianBlur(pixels / 2))


def overlay_mask(change: Image.Image, steps: int) -> Image.Image:
    """Where the edited picture replaces the original: wholly from the change on that one step of sampling makes."""
    return change.point(lambda value: value and min(255, ceil((value + 0.5) * steps)))


def union(changes: Sequence[Image.Image]) -> Image.Image:
    """Where any of the maps changes something, at the size of the first."""
    made = changes[0]
    for change in changes[1:]:
        made = ImageChops.lighter(made, change.resize(made.size))
    return made


def remaining(sigmas: Sequence[float], sigma: float) -> float:
    """The part of the sampling that lies ahead at `sigma`: 1 at the first of `sigmas`, 0 at the last.

    sigmas: the sampler's schedule, falling to 0. Values between two of its steps, where second-order samplers look,
    lie in between.
    """
    steps = len(sigmas) - 1
    return float(np.interp(sigma, sigmas[::-1], np.arange(steps + 1) / steps))


def released(change: Tensor, sigmas: Sequence[float], sigma: float) -> Tensor:
    """What may change at this noise level, as booleans: a map value of m stays for the first 1 - m of the steps.

    Until then both what the UNet sees and what it answers are the original's, so that 0 keeps it exactly, and one value
    all over is img2img at that part of the strength. The paper holds only what the UNet sees, which gives every pixel
    one step more.
    """
    return (change > 0) & (change >= remaining(sigmas, sigma) - HALF_A_LEVEL)


def free_steps(change: Tensor, steps: int) -> Tensor:
    """In how many of the steps the values of a map may change; 0 where they never do."""
    schedule = [1 - done / steps for done in range(steps + 1)]
    return torch.stack([released(change, schedule, sigma) for sigma in schedule[:-1]]).sum(dim=0)


def free_steps_of_values(steps: int) -> list[int]:
    """The same of each of the 256 values that a map has."""
    return free_steps(torch.arange(256) / 255, steps).tolist()


def check_changes(change: Tensor, steps: int) -> None:
    """Raises LayerDiffuseError where a map [B, 1, H/8, W/8] is so dark that a picture would stay as it is."""
    brightest = change.flatten(1).amax(dim=1).min()
    if not free_steps(brightest, steps):
        raise LayerDiffuseError(
            f"The change map is too dark: nothing would change. With {steps} steps of sampling, its brightest part has "
            f"to be {1 / steps:.2f} of white, and is {brightest:.2f}. Choose a brighter map, more steps or a higher "
            "denoising strength."
        )


def labelled(picture: Image.Image, texts: Sequence[str]) -> Image.Image:
    """The picture with texts under its columns, all of one width."""
    scale = max(1, picture.width // (len(texts) * 40))
    strip = Image.new("L", (picture.width // scale, STRIP), 0)
    draw = ImageDraw.Draw(strip)
    for column, text in enumerate(texts):
        middle = (column + 0.5) * strip.width / len(texts)
        draw.text((middle - draw.textlength(text) / 2, 0), text, 255)
    strip = strip.resize((picture.width, STRIP * scale), Image.Resampling.NEAREST)
    whole = Image.new("RGB", (picture.width, picture.height + strip.height))
    whole.paste(picture, (0, 0))
    whole.paste(strip, (0, picture.height))
    return whole


def map_tensor(changes: Sequence[Image.Image], height: int, width: int) -> Tensor:
    """Maps as the UNet meets them: [B, 1, height, width] in 0..1, each cell the mean of the pixels it covers."""
    values = [torch.from_numpy(np.asarray(change, np.float32) / 255)[None, None] for change in changes]
    return torch.nn.functional.interpolate(torch.cat(values), size=(height, width), mode="area")
