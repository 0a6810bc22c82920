"""Train the tiny world's VAE.

    python -m training.tiny.vae --data "scenes:1+pictures:1" --output FOLDER [options]

Transparent pictures are seen over plain colours: grey, as transparent latents have them, every second time. Writes a
diffusers folder; its scaling factor brings latents to a deviation of 1, as those of Stable Diffusion are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from lib_layerdiffuse.images.rgba import compose
from lib_layerdiffuse.tensors import Rgb, Rgba
from training.data import open_source
from training.tiny.models import make_vae
from training.trainer import PictureSettings, Trainer, cropped, loader_of, parse, train

MEASURED = 64  # batches, for the scaling factor


@dataclass(frozen=True, kw_only=True)
class VaeSettings(PictureSettings):
    """The options of this trainer."""

    divergence: float = 1e-7


HELP = {"divergence": "weight of the posterior's distance from the normal distribution; reconstruction has 1"}


class ThereAndBack(nn.Module):
    """For DDP: all of it in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.vae = make_vae()

    def forward(self, rgb: Rgb) -> tuple[Rgb, Tensor]:
        posterior = self.vae.encode(2 * rgb - 1).latent_dist
        return self.vae.decode(posterior.sample()).sample / 2 + 0.5, posterior.kl().mean()


class VaeTrainer(Trainer):
    """Squared and absolute errors of pixels, and those of their slopes, which keep edges sharp."""

    settings: VaeSettings
    dataset: Any

    def losses(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        rgb = over_colours(cropped(batch["rgba"], self.settings.crop))
        answer, divergence = self.net(rgb)
        losses = {
            "pixels": F.mse_loss(answer, rgb),
            "absolute": F.l1_loss(answer, rgb),
            "slopes": sum(F.l1_loss(answer.diff(dim=dim), rgb.diff(dim=dim)) for dim in (2, 3)),
            "divergence": divergence,
        }
        total = losses["pixels"] + 0.1 * (losses["absolute"] + losses["slopes"])
        return total + self.settings.divergence * divergence, losses

    def pictures(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        rgb = over_colours(batch["rgba"][:2])
        shown = torch.cat([rgb, self.plain(rgb)[0].clamp(0, 1)], dim=3)
        return {"truth, answer": torch.cat(list(shown), dim=1)}

    def export(self, folder: Path) -> None:
        vae = self.plain.vae
        batches = islice(loader_of(self.settings, self.dataset), MEASURED)
        latents = [vae.encode(2 * over_colours(batch["rgba"]).to(vae.device) - 1).latent_dist.mean for batch in batches]
        vae.register_to_config(scaling_factor=round(1 / torch.cat(latents).std().item(), 5))
        vae.half().save_pretrained(folder)


def over_colours(rgba: Rgba) -> Rgb:
    """Over grey, every second over a colour of its own."""
    colours = torch.rand(len(rgba), 3, 1, 1, device=rgba.device)
    colours[::2] = 0.5
    return compose(rgba, colours)


def make(settings: VaeSettings, accelerator: Accelerator) -> tuple[VaeTrainer, Dataset[Any]]:
    net = ThereAndBack()
    if settings.checkpointing:
        net.vae.enable_gradient_checkpointing()
    trainer = VaeTrainer(settings, accelerator, net)
    trainer.dataset = open_source(settings.data, settings.size)
    return trainer, trainer.dataset


if __name__ == "__main__":
    train(parse(VaeSettings, __doc__, HELP), make)
