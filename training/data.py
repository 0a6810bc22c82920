"""Transparent pictures with captions, to train on.

A source is one of

- a folder of RGBA pictures, captions in metadata.jsonl ({"file_name": …, "text": …}) or beside each picture as .txt;
- WebDataset shards, like "shards/{00..99}.tar", of which each sample has a .png and a .txt;
- "scenes:SEED", the procedural scenes of training/scenes.py;
- "pictures:SEED", opaque ones: those scenes before their backgrounds, and backgrounds alone;
- several of these, joined by "+".

Layered data, for methods with backgrounds and blends, is

- a folder with NAME.fg.png, NAME.bg.png and NAME.blend.png, and a caption for each, NAME.fg.txt and so on;
- WebDataset shards, which are such folders packed by tar;
- "scenes:SEED".

Pictures are cropped around the middle and resized, premultiplied, so that hidden colour does not bleed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, TypeVar

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset

from lib_layerdiffuse.cli.metrics import check_some, pictures
from lib_layerdiffuse.images.reading import read_file
from lib_layerdiffuse.images.rgba import ResizeMode, fit, from_pil
from lib_layerdiffuse.methods import Layer
from training.scenes import MATERIALS, Picture, layers, scene

SCENES = 1_000_000  # of a seed; more than any training sees


class Sample(TypedDict):
    rgba: Tensor  # [4, H, W], 0..1, straight
    caption: str


LayeredSample: TypeAlias = dict[str, Sample]  # by the values of Layer
S = TypeVar("S")


def open_source(source: str, size: int) -> Dataset[Sample]:
    """The samples of a source, size × size pixels. Raises ValueError where there are none."""
    if "+" in source:
        return ConcatDataset([open_source(part, size) for part in source.split("+")])
    kind, _, seed = source.partition(":")
    if kind in MADE:
        return Made(MADE[kind], int(seed), size)
    return shards(source, size) if source.endswith(".tar") else Folder(Path(source), size)


def open_layers(source: str, size: int) -> Dataset[LayeredSample]:
    """The samples of layered data, size × size pixels. Raises ValueError where there are none."""
    kind, _, seed = source.partition(":")
    if kind == "scenes":
        return Made(layered_scene, int(seed), size)
    return layered_shards(source, size) if source.endswith(".tar") else LayeredFolder(Path(source), size)


def sample(image: Image.Image, caption: str, size: int) -> Sample:
    fitted = fit(image, ResizeMode.CROP_AND_RESIZE, size, size).convert("RGBA")
    return {"rgba": from_pil(fitted), "caption": caption.strip()}


class Folder(Dataset[Sample]):
    def __init__(self, folder: Path, size: int) -> None:
        self.size = size
        self.rows = list(captions(folder).items())
        check_some(self.rows, folder)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Sample:
        path, caption = self.rows[index]
        return sample(read_file(path), caption, self.size)


def captions(folder: Path) -> dict[Path, str]:
    """Of each picture. Raises ValueError where one has none, or is not there."""
    table = folder / "metadata.jsonl"
    if table.exists():
        rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
        found = {folder / row["file_name"]: row["text"] for row in rows}
    else:
        found = {path: caption_beside(path) for path in pictures(folder.rglob("*"))}
    if absent := [path for path in found if not path.exists()]:
        raise ValueError(f"{table} names {absent[0]}, which is not there.")
    return found


def caption_beside(path: Path) -> str:
    text = path.with_suffix(".txt")
    if not text.exists():
        raise ValueError(f"{path} has no caption: put it into {text}, or those of all pictures into metadata.jsonl.")
    return text.read_text(encoding="utf-8")


class LayeredFolder(Dataset[LayeredSample]):
    def __init__(self, folder: Path, size: int) -> None:
        self.size = size
        self.names = [path.with_suffix("").with_suffix("") for path in sorted(folder.rglob("*.fg.png"))]
        if not self.names:
            raise ValueError(f"There are no layers in {folder}: expected files ending in .fg.png, .bg.png, .blend.png.")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> LayeredSample:
        paths = {layer.value: self.names[index].with_suffix(f".{layer.value}.png") for layer in Layer}
        return {name: sample(read_file(path), caption_beside(path), self.size) for name, path in paths.items()}


class OneLayer(Dataset[LayeredSample]):
    """Pictures as layered data with nothing but this layer."""

    def __init__(self, dataset: Any, layer: Layer) -> None:
        self.dataset, self.layer = dataset, layer

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> LayeredSample:
        return {self.layer.value: self.dataset[index]}


class Made(Dataset[S]):
    """What a generator of scenes makes of index, seed and size."""

    def __init__(self, make: Callable[[int, int, int], S], seed: int, size: int) -> None:
        self.make, self.seed, self.size = make, seed, size

    def __len__(self) -> int:
        return SCENES

    def __getitem__(self, index: int) -> S:
        return self.make(index, self.seed, self.size)


def made_sample(picture: Picture, caption: str) -> Sample:
    pixels = torch.from_numpy(picture).permute(2, 0, 1)
    opaque = torch.ones_like(pixels[:1])
    return {"rgba": torch.cat([pixels, opaque])[:4].contiguous(), "caption": caption}


def transparent_scene(index: int, seed: int, size: int) -> Sample:
    made = scene(index, seed, size)
    return made_sample(made.rgba, made.caption)


def layered_scene(index: int, seed: int, size: int) -> LayeredSample:
    made = layers(index, seed, size)
    return {
        Layer.FG.value: made_sample(made.foreground.rgba, made.foreground.caption),
        Layer.BG.value: made_sample(made.background, made.background_caption),
        Layer.BLEND.value: made_sample(made.blend, made.blend_caption),
    }


def opaque_picture(index: int, seed: int, size: int) -> Sample:
    """What a model that knows nothing of transparency learns: scenes, whose background is not always said, and
    every fourth time a background alone."""
    made = layers(index, seed, size)
    turn = index // len(MATERIALS) % 4
    if turn == 0:
        return made_sample(made.background, made.background_caption)
    return made_sample(made.blend, made.foreground.caption if turn == 1 else made.blend_caption)


MADE = {"scenes": transparent_scene, "pictures": opaque_picture}


def shards(pattern: str, size: int) -> IterableDataset[Sample]:
    """In random order, without end, divided among workers and machines."""
    return parts_of_shards(pattern, "png", "txt").map(partial(shard_sample, size))


def layered_shards(pattern: str, size: int) -> IterableDataset[LayeredSample]:
    """As `shards`."""
    parts = [f"{layer.value}.{kind}" for layer in Layer for kind in ("png", "txt")]
    return parts_of_shards(pattern, *parts).map(partial(layered_shard_sample, size))


# Named functions, because Windows and macOS pickle a dataset for each worker.


def shard_sample(size: int, parts: Sequence[Any]) -> Sample:
    return sample(*parts, size)


def layered_shard_sample(size: int, parts: Sequence[Any]) -> LayeredSample:
    return {layer.value: sample(*parts[2 * i : 2 * i + 2], size) for i, layer in enumerate(Layer)}


def parts_of_shards(pattern: str, *parts: str) -> Any:
    """Of each sample what its files with these endings hold, pictures as RGBA."""
    import webdataset  # here: only large sets need it

    samples = webdataset.WebDataset(
        address(pattern), resampled=True, shardshuffle=False, nodesplitter=webdataset.split_by_node
    )
    return samples.shuffle(1000).decode("pilrgba").to_tuple(*parts)


def address(pattern: str) -> str:
    """As webdataset takes it, to which Windows' backslashes are escapes, and a drive's letter the scheme of a URL."""
    slashed = pattern.replace(os.sep, "/")
    return f"file:{slashed}" if re.match("[a-zA-Z]:/", slashed) else slashed
