"""Transparent pictures with captions, to train on.

A source is one of

- a folder of RGBA pictures, captions in metadata.jsonl ({"file_name": …, "text": …}) or beside each picture as .txt;
- WebDataset shards, like "shards/{00..99}.tar", of which each sample has a .png and a .txt;
- "scenes:SEED", the procedural scenes of training/scenes.py.

Pictures are cropped around the middle and resized, premultiplied, so that hidden colour does not bleed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TypedDict

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from lib_layerdiffuse.images import ResizeMode, fit, from_pil
from training.scenes import scene

SUFFIXES = (".png", ".webp", ".tif", ".tiff")  # formats that can keep alpha without loss
SCENES = 1_000_000  # of a seed; more than any training sees


class Sample(TypedDict):
    rgba: Tensor  # [4, H, W], 0..1, straight
    caption: str


def open_source(source: str, size: int) -> Dataset[Sample]:
    """The samples of a source, size × size pixels. Raises ValueError where there are none."""
    if source.startswith("scenes:"):
        return Scenes(int(source.removeprefix("scenes:")), size)
    return shards(source, size) if source.endswith(".tar") else Folder(Path(source), size)


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
        with Image.open(path) as image:
            return sample(image, caption, self.size)


def pictures(paths: Iterable[Path]) -> list[Path]:
    """Those of them that are pictures, in order."""
    return sorted(path for path in paths if path.suffix.lower() in SUFFIXES)


def check_some(found: Collection[object], folder: Path) -> None:
    if not found:
        raise ValueError(f"There are no pictures in {folder}: expected files ending in {', '.join(SUFFIXES)}.")


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


class Scenes(Dataset[Sample]):
    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size

    def __len__(self) -> int:
        return SCENES

    def __getitem__(self, index: int) -> Sample:
        made = scene(index, self.seed, self.size)
        return {"rgba": torch.from_numpy(made.rgba).permute(2, 0, 1).contiguous(), "caption": made.caption}


def shards(pattern: str, size: int) -> IterableDataset[Sample]:
    """In random order, without end, divided among workers and machines."""
    import webdataset  # here: only large sets need it

    samples = webdataset.WebDataset(pattern, resampled=True, shardshuffle=False, nodesplitter=webdataset.split_by_node)
    return samples.shuffle(1000).decode("pilrgba").to_tuple("png", "txt").map(lambda pair: sample(*pair, size))
