"""Train a model of the tiny world, text encoders and UNet, that knows nothing of transparency.

    python -m training.tiny.base --family sd15 --vae FOLDER --data pictures:1 --output FOLDER [options]

Writes a diffusers folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from lib_layerdiffuse.methods import Family, Layer
from training import diffusion
from training.data import OneLayer, open_source
from training.diffusion import DiffusionSettings, DiffusionTrainer, Encoder
from training.tiny.models import MAKERS
from training.trainer import parse, train
from training.transparent_vae import load_vae


@dataclass(frozen=True, kw_only=True)
class BaseSettings(DiffusionSettings):
    """The options of this trainer."""

    family: str
    vae: str


HELP = {**diffusion.HELP, "family": "sd15 or sdxl", "vae": "what training.tiny.vae wrote"}


class Base(nn.Module):
    """The parts of a pipeline that learn."""

    def __init__(self, pipeline: Any) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module) and name != "vae"}
        )

    def forward(self, noisy: Tensor, timesteps: Tensor, context: Tensor, added: Any, condition: Tensor) -> Tensor:
        return self.parts["unet"](noisy, timesteps, context, added_cond_kwargs=added).sample


class BaseTrainer(DiffusionTrainer):
    """On one GPU or none: the captions are read outside the network's forward."""

    def export(self, folder: Path) -> None:
        self.pipeline.to(torch.float16).save_pretrained(folder)


def make(settings: BaseSettings, accelerator: Accelerator) -> tuple[BaseTrainer, Dataset[Any]]:
    pipeline = MAKERS[Family(settings.family)](load_vae(settings.vae)).to(accelerator.device)
    if settings.checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    encoder = Encoder(pipeline, None, (), (Layer.BLEND,))
    trainer = BaseTrainer(settings, accelerator, Base(pipeline), pipeline, encoder)
    return trainer, OneLayer(open_source(settings.data, settings.size), Layer.BLEND)


if __name__ == "__main__":
    train(parse(BaseSettings, __doc__, HELP), make)
