"""Train the transparent pair: what hides transparency in latents, and what finds it there again.

    accelerate launch -m training.transparent_vae --vae MODEL --data SOURCE --output FOLDER [options]

MODEL: a diffusers folder, a single file, or a hub name; only its VAE is used, and stays as it is. SOURCE: see
training/data.py. Writes `vae_transparent_encoder.safetensors` and `vae_transparent_decoder.safetensors` as the
extension reads them. A run that was stopped goes on where it was when it is started again with the same output folder.

Opaque pictures in the source teach the decoder that what has no offset is opaque.

The encoder offsets the latent of a picture over grey such that the frozen VAE's decoder hardly notices (identity), and
the decoder gets colour and alpha back from latent and decoded pixels (reconstruction), to an eye that is trained beside
it (a PatchGAN, Isola et al. 2017, with hinge loss): arXiv 2402.17113, section 3.1, whose weights are the defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset

from lib_layerdiffuse.images.rgba import GREY, checkerboard, compose, padded_argb
from lib_layerdiffuse.nets.decoder import ResNet, SelfAttention, TransparentDecoder
from lib_layerdiffuse.nets.encoder import TransparentEncoder
from lib_layerdiffuse.tensors import Argb, Latent, Rgb, Rgba
from lib_layerdiffuse.vae import OFFSET_SCALE, ORIENTATIONS
from training.data import Sample, open_source
from training.trainer import PictureSettings, Trainer, cropped, parse, save_halves, train

ENCODER_WIDTHS = (32, 32, 64, 64, 128, 128, 256, 256)
DECODER_WIDTHS = (32, 32, 64, 128, 256, 512, 512)
ATTENDING = 3  # of the decoder's blocks, the last ones
AS_PAINTED = 0.5  # share of the opaque pictures whose latents get no offset, as if the model had painted them


@dataclass(frozen=True, kw_only=True)
class PairSettings(PictureSettings):
    """The options of this trainer."""

    vae: str
    noise: float = 0.0
    reconstruction: float = 1.0
    composed: float = 0.0
    identity: float = 1.0
    adversarial: float = 0.01
    adversarial_from: int = 5_000
    encoder_widths: tuple[int, ...] = ENCODER_WIDTHS
    decoder_widths: tuple[int, ...] = DECODER_WIDTHS


HELP = {
    "vae": "a diffusers folder, a single file or a hub name",
    "noise": "added to the latents that the decoder sees, a diffusion model's never being exact; they have deviation 1",
    "reconstruction": "weight of alpha and padded colour",
    "composed": "weight of what is seen over random colours, where hidden colour does not count (as arXiv 2507.09308)",
    "identity": "weight of what the frozen decoder notices",
    "adversarial": "weight of what the PatchGAN finds wrong",
    "adversarial_from": "the step from which the PatchGAN counts",
    "encoder_widths": "of the convolutions between the first and the last",
    "decoder_widths": "of the levels",
}


# --- networks ---


def load_vae(model: str) -> AutoencoderKL:
    """The VAE of a diffusers folder, a single file or a hub name, frozen."""
    if Path(model).is_file():
        vae = AutoencoderKL.from_single_file(model)
    else:
        inner = (Path(model) / "vae").is_dir() or not Path(model).is_dir()
        vae = AutoencoderKL.from_pretrained(model, subfolder="vae" if inner else None)
    return vae.requires_grad_(False).eval()


def there_and_back(
    vae: AutoencoderKL, grey: Rgb, offset: Latent | float = 0.0, noise: float = 0.0
) -> tuple[Rgb, Latent]:
    """What the VAE shows of a picture whose latent is offset, in deviations of its posterior; and that latent.

    noise: its deviation, in sampler space.
    """
    with torch.no_grad():
        posterior = vae.encode(2 * grey - 1).latent_dist
    latent = posterior.mean + posterior.std * offset
    latent = latent + noise / vae.config.scaling_factor * torch.randn_like(latent)
    return vae.decode(latent).sample / 2 + 0.5, latent


class TransparentPair(nn.Module):
    """Encoder and decoder; the VAE between them is not part of it."""

    def __init__(
        self, vae: AutoencoderKL, encoder_widths: Sequence[int], decoder_widths: Sequence[int], noise: float = 0.0
    ) -> None:
        super().__init__()
        channels = vae.config.latent_channels
        attends = [level >= len(decoder_widths) - ATTENDING for level in range(len(decoder_widths))]
        self.encoder = TransparentEncoder([4, *encoder_widths, channels])
        self.decoder = TransparentDecoder(decoder_widths, 2, attends, 3, channels, 4)
        self.noise = noise
        for layer in self.encoder.blocks[::2]:  # no norm is between them: with torch's own, nothing arrives at the end
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        last = self.encoder.blocks[-1]
        nn.init.zeros_(last.weight)  # at first, the latent is that of the picture over grey
        nn.init.zeros_(last.bias)
        self._vae = lambda: vae  # neither a submodule nor copied with this

    @property
    def vae(self) -> AutoencoderKL:
        return self._vae()

    def forward(self, rgba: Rgba) -> tuple[Argb, Argb, Rgb, Rgb]:
        """What the decoder should answer, and does; what the frozen decoder should show, and does."""
        truth = padded_argb(rgba)
        grey = compose(rgba, GREY)
        opaque = (rgba[:, 3:] == 1).all(dim=3, keepdim=True).all(dim=2, keepdim=True)
        as_painted = opaque & (torch.rand_like(opaque, dtype=rgba.dtype) < AS_PAINTED)
        offset = OFFSET_SCALE * self.encoder(truth).masked_fill(as_painted, 0)
        seen, latent = there_and_back(self.vae, grey, offset, self.noise)
        turned = ORIENTATIONS[torch.randint(len(ORIENTATIONS), ())]  # one of those in which it is going to be asked
        return truth, turned.undo(self.decoder(turned.apply(seen), turned.apply(latent))), grey, seen

    def checkpointed(self) -> None:
        """From now on, activations within the parts of blocks are computed a second time rather than kept."""
        self.vae.train()  # which has no dropout; only so does diffusers' checkpointing count
        self.vae.enable_gradient_checkpointing()
        for part in self.decoder.modules():
            if isinstance(part, (ResNet, SelfAttention)):
                part.forward = partial(checkpoint, part.forward, use_reentrant=False)


def patch_gan(channels: int = 4, width: int = 64) -> nn.Sequential:
    """Five convolutions: how real each patch of 70×70 pixels looks. [B, 4, H, W] -> [B, 1, H/8 - 2, W/8 - 2]."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
    for i, stride in enumerate((2, 2, 1)):
        n_in, n_out = width * 2**i, width * 2 ** (i + 1)
        layers += [nn.Conv2d(n_in, n_out, 4, stride, 1), nn.GroupNorm(8, n_out), nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))


def straight(argb: Argb) -> Rgba:
    return argb[:, [1, 2, 3, 0]]


def premultiplied(argb: Argb) -> Tensor:
    """As the PatchGAN sees it: colour only where there is something."""
    return torch.cat([argb[:, :1], argb[:, 1:] * argb[:, :1]], dim=1)


# --- training ---


class PairTrainer(Trainer):
    """The pair, and the PatchGAN that learns beside it."""

    settings: PairSettings

    def __init__(self, settings: PairSettings, accelerator: Accelerator, pair: TransparentPair) -> None:
        super().__init__(settings, accelerator, pair)
        self.critic, self.of_critic, self.critic_rate = self.prepared(patch_gan())

    def losses(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Unweighted where they are shown."""
        truth, answer, grey, seen = self.net(cropped(batch["rgba"], self.settings.crop))
        background = torch.rand(len(truth), 3, 1, 1, device=truth.device)
        losses = {
            "reconstruction": F.mse_loss(answer, truth),
            "composed": F.mse_loss(*(compose(straight(argb), background) for argb in (answer, truth))),
            "identity": F.mse_loss(seen, grey),
        }
        total = sum(getattr(self.settings, name) * loss for name, loss in losses.items())
        if self.step >= self.settings.adversarial_from:
            losses["critic"] = self._criticised(truth, answer)
            self.critic.requires_grad_(False)
            losses["adversarial"] = -self.critic(premultiplied(answer)).mean()
            self.critic.requires_grad_(True)
            total = total + self.settings.adversarial * losses["adversarial"]
        return total, losses

    def _criticised(self, truth: Argb, answer: Argb) -> Tensor:
        """The PatchGAN's own loss, by which it has learnt."""
        real, made = (self.critic(premultiplied(each.detach())) for each in (truth, answer))
        loss = F.relu(1 - real).mean() + F.relu(1 + made).mean()
        self.descend(loss, self.critic, self.of_critic, self.critic_rate)
        return loss

    def pictures(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Truth, answer, and what the frozen decoder shows, side by side."""
        rgba = batch["rgba"][:1]
        truth, answer, _, seen = self.plain(rgba)
        checks = checkerboard(*rgba.shape[2:]).to(rgba)
        composed = [compose(straight(argb).clamp(0, 1), checks) for argb in (truth, answer)]
        return {"truth, answer, frozen decoder": torch.cat([*composed, seen.clamp(0, 1)], dim=3)[0].float()}

    def export(self, folder: Path) -> None:
        """In half precision, under the names that the extension looks for."""
        for part in ("encoder", "decoder"):
            tensors = getattr(self.plain, part).state_dict()
            save_halves(tensors, folder / f"vae_transparent_{part}.safetensors")


def make(settings: PairSettings, accelerator: Accelerator) -> tuple[PairTrainer, Dataset[Sample]]:
    vae = load_vae(settings.vae).to(accelerator.device)
    pair = TransparentPair(vae, settings.encoder_widths, settings.decoder_widths, settings.noise)
    if settings.checkpointing:
        pair.checkpointed()
    return PairTrainer(settings, accelerator, pair), open_source(settings.data, settings.size)


if __name__ == "__main__":
    train(parse(PairSettings, __doc__, HELP), make)
