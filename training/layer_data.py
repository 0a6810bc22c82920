"""Make layered data of transparent pictures: each gets a background that an inpainting model imagines.

    python -m training.layer_data --data FOLDER --model INPAINTING_MODEL --output FOLDER [options]

FOLDER has RGBA pictures with captions (training/data.py); a text NAME.bg.txt beside NAME.png says what the background
should be. INPAINTING_MODEL: a diffusers folder or a hub name. First the model paints around the foreground, which
gives a background that belongs to it; then it paints over the foreground, which completes the background; the blend is
the foreground over that, so that the three belong together to the last pixel (after arXiv 2402.17113, section 3.3).

With --cluster, Ray Data spreads the pictures over a Ray cluster ("auto" for the one that this machine belongs to, or
"local" for this machine alone), one copy of the model for each GPU. What is there already is not made again.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from diffusers import AutoPipelineForInpainting
from PIL import Image, ImageFilter
from tqdm import tqdm

from lib_layerdiffuse.images.reading import read_file
from lib_layerdiffuse.images.rgba import flattened, over, to_pil
from training.data import captions, sample

SEEN_THROUGH = 9  # pixels by which the masked part goes beyond the foreground's edge, so that nothing of it stays


class Row(TypedDict):
    """A foreground, as Ray passes it on."""

    path: str
    caption: str
    background: str  # caption; empty where nobody said


@dataclass(frozen=True)
class Settings:
    """The options."""

    data: str
    model: str
    output: str
    size: int = 512
    steps: int = 30
    cfg: float = 7.0
    seed: int = 0


class Builder:
    """An inpainting model that is loaded once and called for each foreground."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        device = "cuda" if torch.cuda.is_available() else "cpu"
        precision = torch.float16 if device == "cuda" else torch.float32
        self.pipeline = AutoPipelineForInpainting.from_pretrained(settings.model, torch_dtype=precision).to(device)
        self.pipeline.set_progress_bar_config(disable=True)

    def __call__(self, row: Row) -> Row:
        """Write the three layers with their captions."""
        name = Path(self.settings.output) / Path(row["path"]).stem
        if not name.with_name(f"{name.name}.blend.png").exists():  # the last that is written
            self._build(row, name)
        return row

    def _build(self, row: Row, name: Path) -> None:
        foreground = to_pil(sample(read_file(Path(row["path"])), "", self.settings.size)["rgba"])
        alpha = foreground.getchannel("A")
        around = alpha.point(lambda value: 255 - value)
        about = row["background"] or "a background"
        first = self._paint(f"{row['caption']}, {about}", flattened(foreground), around)
        hidden = alpha.point(lambda value: 255 if value else 0).filter(ImageFilter.MaxFilter(SEEN_THROUGH))
        background = self._paint(about, over(foreground, first), hidden)
        made = {
            "fg": (foreground, row["caption"]),
            "bg": (background, about),
            "blend": (over(foreground, background), f"{row['caption']}, {about}"),
        }
        for layer, (picture, caption) in made.items():
            name.with_name(f"{name.name}.{layer}.txt").write_text(caption + "\n", encoding="utf-8")
            picture.save(name.with_name(f"{name.name}.{layer}.png"))

    def _paint(self, prompt: str, picture: Image.Image, mask: Image.Image) -> Image.Image:
        """The picture with what is white in the mask painted anew, and all else as it was."""
        settings = self.settings
        painted = self.pipeline(
            prompt=prompt,
            image=picture,
            mask_image=mask,
            width=settings.size,
            height=settings.size,
            num_inference_steps=settings.steps,
            guidance_scale=settings.cfg,
            generator=torch.Generator().manual_seed(settings.seed),
        ).images[0]
        return Image.composite(painted, picture, mask)


def rows_of(folder: Path) -> list[Row]:
    return [
        {"path": str(path), "caption": caption.strip(), "background": beside(path.with_suffix(".bg.txt"))}
        for path, caption in captions(folder).items()
    ]


def beside(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def build(settings: Settings, cluster: str | None) -> None:
    rows = rows_of(Path(settings.data))
    Path(settings.output).mkdir(parents=True, exist_ok=True)
    if cluster is None:
        builder = Builder(settings)
        for row in tqdm(rows, "layers"):
            builder(row)
        return
    import ray  # here: only clusters need it

    ray.init(address=None if cluster == "local" else cluster)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    work: dict[str, Any] = {"num_gpus": 1, "concurrency": gpus} if gpus else {"concurrency": 1}
    ray.data.from_items(rows).map(Builder, fn_constructor_args=(settings,), **work).materialize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "model", "output"):
        parser.add_argument(f"--{name}", required=True)
    for name, kind in (("size", int), ("steps", int), ("cfg", float), ("seed", int)):
        parser.add_argument(f"--{name}", type=kind, default=getattr(Settings, name))
    parser.add_argument("--cluster")
    given = vars(parser.parse_args())
    cluster = given.pop("cluster")
    build(Settings(**given), cluster)


if __name__ == "__main__":
    main()
