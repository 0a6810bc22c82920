"""Procedural transparent pictures with captions: shapes of six materials, textured backgrounds, and both together.

    python -m training.scenes FOLDER [--count 600] [--seed 0] [--size 128] [--held-out] [--layers]

writes RGBA PNGs with their captions, as training/data.py reads them, and a contact sheet.
Every scene is made from its seed and index alone. A fifth of the pairs of shape and colour is held out: only
`held_out=True` makes them, for tests of what was never trained on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageDraw

from lib_layerdiffuse.images.rgba import to_pil

Plane = np.ndarray  # [H, W] float32
Picture = np.ndarray  # [H, W, 3 or 4] float32 in 0..1, straight alpha, colour everywhere

COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.15, 0.65, 0.2),
    "blue": (0.15, 0.3, 0.9),
    "yellow": (0.95, 0.85, 0.15),
    "purple": (0.55, 0.2, 0.75),
    "orange": (0.95, 0.5, 0.1),
    "cyan": (0.15, 0.8, 0.85),
    "pink": (0.95, 0.5, 0.7),
}
COLUMNS = {"left": 0.3, "middle": 0.5, "right": 0.7}
ROWS = {"top": 0.3, "middle": 0.5, "bottom": 0.7}
LIGHT = np.array([-0.6, -0.8])  # where it comes from


# --- shapes: signed distances, in radii; negative inside ---


def disc(x: Plane, y: Plane) -> Plane:
    return np.hypot(x, y) - 1


def square(x: Plane, y: Plane) -> Plane:
    return np.maximum(abs(x), abs(y)) - 0.85


def diamond(x: Plane, y: Plane) -> Plane:
    return (abs(x) + abs(y) - 1.1) / math.sqrt(2)


def ring(x: Plane, y: Plane) -> Plane:
    return abs(np.hypot(x, y) - 0.72) - 0.28


def cross(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.minimum(abs(x), abs(y)) - 0.34, np.maximum(abs(x), abs(y)) - 1)


def triangle(x: Plane, y: Plane) -> Plane:
    return np.maximum(abs(x) * math.sqrt(3) / 2 - y / 2, y) - 0.55


def star(x: Plane, y: Plane) -> Plane:
    """Five points, each a pair of straight lines."""
    sector = math.pi / 5
    angle = abs((np.arctan2(x, -y) + sector) % (2 * sector) - sector)  # from the nearest point's direction
    radius = np.hypot(x, y)
    across, along = radius * np.sin(angle), radius * np.cos(angle)
    inner = 0.45 * np.array([math.sin(sector), math.cos(sector)])
    normal = np.array([1.1 - inner[1], inner[0]])
    normal /= np.hypot(*normal)
    return across * normal[0] + (along - 1.1) * normal[1]


def moon(x: Plane, y: Plane) -> Plane:
    return np.maximum(np.hypot(x, y) - 1, 0.8 - np.hypot(x - 0.5, y))


SHAPES: Mapping[str, Callable[[Plane, Plane], Plane]] = {
    each.__name__: each for each in (disc, square, diamond, ring, cross, triangle, star, moon)
}
PAIRS = {(s, c): (shape, colour) for (s, shape), (c, colour) in product(enumerate(SHAPES), enumerate(COLOURS))}
HELD_OUT = [pair for (s, c), pair in PAIRS.items() if (2 * s + c) % 5 == 0]  # one or two of each shape and colour
TRAINED = [pair for pair in PAIRS.values() if pair not in HELD_OUT]


# --- noise ---


def enlarged(grid: Plane, height: int, width: int) -> Plane:
    return np.asarray(Image.fromarray(grid.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC))


def clouds(random: Generator, height: int, width: int, cells: int = 4, octaves: int = 3) -> Plane:
    """Fractal noise, mostly in 0..1."""
    sizes = [cells * 2**i for i in range(octaves)]
    planes = [enlarged(random.random((n, n)), height, width) / 2**i for i, n in enumerate(sizes)]
    return sum(planes) / sum(1 / 2**i for i in range(octaves))


# --- materials: alpha and a factor for the colour, from distances in pixels ---


@dataclass(frozen=True)
class Place:
    """Where a shape lies, and how far each pixel is from its edge, in pixels."""

    x: float
    y: float
    radius: float
    distance: Plane
    random: Generator

    def offsets(self) -> tuple[Plane, Plane]:
        """Of each pixel from the middle, in radii."""
        y, x = np.mgrid[: self.distance.shape[0], : self.distance.shape[1]] + 0.5
        return (x - self.x) / self.radius, (y - self.y) / self.radius


def inside(distance: Plane, blur: float = 1.0) -> Plane:
    """1 within the edge, 0 beyond it, rising over `blur` pixels."""
    return smooth(0.5 - distance / blur)


def smooth(x: Plane) -> Plane:
    x = np.clip(x, 0, 1)
    return x * x * (3 - 2 * x)


def shaded(place: Place) -> Plane:
    """Brighter towards the light."""
    x, y = place.offsets()
    return np.clip(1 + 0.12 * (LIGHT[0] * x + LIGHT[1] * y), 0.7, 1.3)


def solid(place: Place) -> tuple[Plane, Plane]:
    return inside(place.distance), shaded(place)


def soft(place: Place) -> tuple[Plane, Plane]:
    return inside(place.distance, blur=place.radius * place.random.uniform(0.5, 0.9)), shaded(place)


def glass(place: Place) -> tuple[Plane, Plane]:
    """Clear in the middle, denser at the rim, with a highlight."""
    body = place.random.uniform(0.2, 0.45)
    rim = np.exp(-((place.distance + 2) ** 2) / (2 * 2.0**2))
    x, y = place.offsets()
    spot = np.exp(-((x - 0.35 * LIGHT[0]) ** 2 + (y - 0.35 * LIGHT[1]) ** 2) / (2 * 0.13**2))
    alpha = inside(place.distance) * np.clip(body + 0.5 * rim + 0.5 * spot, 0, 1)
    return alpha, 1 + 0.25 * rim + 1.5 * spot


def glow(place: Place) -> tuple[Plane, Plane]:
    """A small bright body within a halo."""
    reach = place.radius * place.random.uniform(0.3, 0.5)
    halo = 0.75 * np.exp(-np.maximum(place.distance + 0.3 * place.radius, 0) / reach)
    body = inside(place.distance + 0.3 * place.radius, blur=3)
    return body + (1 - body) * halo, 1 + 0.3 * body


def smoke(place: Place) -> tuple[Plane, Plane]:
    height, width = place.distance.shape
    density = clouds(place.random, height, width, cells=6)
    frayed = place.distance + place.radius * (clouds(place.random, height, width, cells=5) - 0.5)
    return inside(frayed, blur=0.5 * place.radius) * np.clip(1.6 * density - 0.25, 0.1, 0.95), 0.85 + 0.3 * density


def hair(place: Place) -> tuple[Plane, Plane]:
    """A solid body with fine strands around it."""
    height, width = place.distance.shape
    scale = 4  # drawn larger and made smaller, for strands finer than a pixel
    drawn = Image.new("L", (scale * width, scale * height))
    draw = ImageDraw.Draw(drawn)
    rows, columns = np.nonzero(abs(place.distance + 1) < 1)
    slope_y, slope_x = np.gradient(place.distance)
    for i in place.random.choice(len(rows), size=min(len(rows), round(3.2 * place.radius)), replace=False):
        row, column = rows[i], columns[i]
        direction = math.atan2(slope_y[row, column], slope_x[row, column]) + place.random.normal(0, 0.3)
        length, curl = place.radius * place.random.uniform(0.2, 0.5), place.random.normal(0, 0.1)
        x, y = column + 0.5, row + 0.5
        points = [(scale * x, scale * y)]
        for _ in range(8):
            x, y, direction = (
                x + length / 8 * math.cos(direction),
                y + length / 8 * math.sin(direction),
                direction + curl,
            )
            points.append((scale * x, scale * y))
        draw.line(points, fill=255, width=3)
    strands = np.asarray(drawn.reduce(scale), np.float32) / 255
    return np.maximum(inside(place.distance), strands), shaded(place)


MATERIALS: Mapping[str, Callable[[Place], tuple[Plane, Plane]]] = {
    "solid": solid,
    "soft": soft,
    "glass": glass,
    "glowing": glow,
    "smoky": smoke,
    "hairy": hair,
}


# --- textures: a plane in 0..1 that mixes two colours ---


def stripes(random: Generator, size: int) -> Plane:
    angle, width = random.uniform(0, math.pi), size / random.uniform(5, 10)
    y, x = np.mgrid[:size, :size]
    return smooth(0.5 + 1.5 * np.sin(2 * math.pi * (x * math.cos(angle) + y * math.sin(angle)) / width))


def checks(random: Generator, size: int) -> Plane:
    width = size / random.uniform(5, 9)
    x, y = (np.sin(math.pi * (axis + random.uniform(0, size)) / width) for axis in np.mgrid[:size, :size])
    return smooth(0.5 + 2 * x * y)


def dots(random: Generator, size: int) -> Plane:
    width = size / random.uniform(5, 9)
    x, y = (np.cos(2 * math.pi * (axis + random.uniform(0, size)) / width) for axis in np.mgrid[:size, :size])
    return smooth(0.5 + 1.5 * (x + y - 0.8))


def cloudy(random: Generator, size: int) -> Plane:
    return np.clip(1.6 * clouds(random, size, size) - 0.3, 0, 1)


def gradient(random: Generator, size: int) -> Plane:
    angle = random.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:size, :size] / size - 0.5
    return np.clip(0.5 + 0.7 * (x * math.cos(angle) + y * math.sin(angle)), 0, 1)


TEXTURES: Mapping[str, Callable[[Generator, int], Plane]] = {
    "striped": stripes,
    "checked": checks,
    "dotted": dots,
    "cloudy": cloudy,
    "fading": gradient,
}


# --- scenes ---


@dataclass(frozen=True)
class Scene:
    rgba: Picture
    caption: str
    shape: str
    colour: str
    material: str


@dataclass(frozen=True)
class Layers:
    """What belongs together: a transparent foreground, a background, and the one over the other."""

    foreground: Scene
    background: Picture
    background_caption: str

    @property
    def blend(self) -> Picture:
        colour, alpha = self.foreground.rgba[..., :3], self.foreground.rgba[..., 3:]
        return alpha * colour + (1 - alpha) * self.background

    @property
    def blend_caption(self) -> str:
        return f"{self.foreground.caption} over {self.background_caption}"


def scene(index: int, seed: int = 0, size: int = 128, held_out: bool = False) -> Scene:
    """Materials take turns; everything else is drawn."""
    random = np.random.default_rng((seed, index, held_out))
    material = list(MATERIALS)[index % len(MATERIALS)]
    shape, colour = random.choice(HELD_OUT if held_out else TRAINED)
    column, row = random.choice(list(COLUMNS)), random.choice(list(ROWS))
    alpha, factor = MATERIALS[material](placed(shape, column, row, size, random))
    rgb = np.clip(np.array(COLOURS[colour]) * random.uniform(0.92, 1.08) * factor[..., None], 0, 1)
    rgba = np.concatenate([rgb, np.clip(alpha, 0, 1)[..., None]], axis=2).astype(np.float32)
    return Scene(rgba, f"a {material} {colour} {shape} {position(column, row)}", shape, colour, material)


def placed(shape: str, column: str, row: str, size: int, random: Generator) -> Place:
    x, y = (size * (share + random.uniform(-0.03, 0.03)) for share in (COLUMNS[column], ROWS[row]))
    radius, turn = size * random.uniform(0.16, 0.24), random.uniform(-0.25, 0.25)
    down, across = np.mgrid[:size, :size] + 0.5
    across, down = (across - x) / radius, (down - y) / radius
    turned = (math.cos(turn) * across + math.sin(turn) * down, math.cos(turn) * down - math.sin(turn) * across)
    return Place(x, y, radius, radius * SHAPES[shape](*turned), random)


def position(column: str, row: str) -> str:
    return (
        "in the middle" if column == row else f"at the {' '.join(word for word in (row, column) if word != 'middle')}"
    )


def layers(index: int, seed: int = 0, size: int = 128, held_out: bool = False) -> Layers:
    random = np.random.default_rng((seed, index, held_out, 1))
    texture = random.choice(list(TEXTURES))
    first, second = random.choice(list(COLOURS), size=2, replace=False)
    mix = TEXTURES[texture](random, size)[..., None]
    colours = [np.array(COLOURS[name]) * 0.5 + 0.35 for name in (first, second)]  # paler than what lies on it
    background = np.clip(mix * colours[0] + (1 - mix) * colours[1], 0, 1).astype(np.float32)
    return Layers(scene(index, seed, size, held_out), background, f"a {texture} {first} and {second} background")


# --- files ---


def to_image(picture: Picture) -> Image.Image:
    return to_pil(torch.from_numpy(picture).permute(2, 0, 1))


def write(folder: Path, count: int, seed: int, size: int, held_out: bool, with_layers: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        made = layers(index, seed, size, held_out)
        pictures = {"": (made.foreground.rgba, made.foreground.caption)}
        if with_layers:
            backgrounds = {
                ".bg": (made.background, made.background_caption),
                ".blend": (made.blend, made.blend_caption),
            }
            pictures = {".fg": pictures[""], **backgrounds}
        for suffix, (picture, caption) in pictures.items():
            to_image(picture).save(folder / f"{index:06}{suffix}.png")
            (folder / f"{index:06}{suffix}.txt").write_text(caption + "\n", encoding="utf-8")
    contact_sheet(min(count, 60), seed, size, held_out).save(folder.with_name(folder.name + "-sheet.png"))


def contact_sheet(count: int, seed: int = 0, size: int = 128, held_out: bool = False) -> Image.Image:
    """Blends, six in a row: a column for each material."""
    columns = len(MATERIALS)
    sheet = Image.new("RGB", (columns * size, math.ceil(count / columns) * size))
    for index in range(count):
        at = (index % columns * size, index // columns * size)
        sheet.paste(to_image(layers(index, seed, size, held_out).blend), at)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--layers", dest="with_layers", action="store_true")
    write(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
