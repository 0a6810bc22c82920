"""Train the transparent pair: what hides transparency in latents, and what finds it there again.

    accelerate launch -m training.transparent_vae --vae MODEL --data SOURCE --output FOLDER [options]

MODEL: a diffusers folder, a single file, or a hub name; only its VAE is used, and stays as it is. SOURCE: see
training/data.py. Writes `vae_transparent_encoder.safetensors` and `vae_transparent_decoder.safetensors` as the
extension reads them. A run that was stopped goes on where it was when it is started again with the same output folder.

The encoder offsets the latent of a picture over grey such that the frozen VAE's decoder hardly notices (identity), and
the decoder gets colour and alpha back from latent and decoded pixels (reconstruction), to an eye that is trained beside
it (a PatchGAN, Isola et al. 2017, with hinge loss): arXiv 2402.17113, section 3.1, whose weights are the defaults.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lib_layerdiffuse.images import checkerboard, compose, padded_argb
from lib_layerdiffuse.nets.decoder import ResNet, SelfAttention, TransparentDecoder
from lib_layerdiffuse.nets.encoder import TransparentEncoder
from lib_layerdiffuse.tensors import Argb, Latent, Rgb, Rgba
from lib_layerdiffuse.vae import OFFSET_SCALE
from training.data import open_source

ENCODER_WIDTHS = (32, 32, 64, 64, 128, 128, 256, 256)
DECODER_WIDTHS = (32, 32, 64, 128, 256, 512, 512)
ATTENDING = 3  # of the decoder's blocks, the last ones
GREY = torch.tensor(0.5)


@dataclass(frozen=True)
class Settings:
    vae: str
    data: str
    output: str
    size: int = 512
    batch: int = 4
    steps: int = 100_000
    rate: float = 1e-4
    precision: str = "no"
    accumulate: int = 1
    checkpointing: bool = False
    ema: float = 0.999
    identity: float = 1.0
    adversarial: float = 0.01
    adversarial_from: int = 5_000
    save_every: int = 1_000
    encoder_widths: tuple[int, ...] = ENCODER_WIDTHS
    decoder_widths: tuple[int, ...] = DECODER_WIDTHS
    workers: int = 2
    seed: int = 0


HELP = {
    "size": "of the pictures, in pixels; a multiple of 64",
    "precision": "no, fp16 or bf16",
    "accumulate": "batches to a step",
    "checkpointing": "less memory for more time",
    "ema": "how much of the averaged weights stays in each step",
    "identity": "weight of what the frozen decoder notices; reconstruction has 1",
    "adversarial_from": "the step from which the PatchGAN counts",
    "save_every": "steps between two states to go on from",
    "encoder_widths": "of the convolutions between the first and the last",
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


def there_and_back(vae: AutoencoderKL, grey: Rgb, offset: Latent | float = 0.0) -> tuple[Rgb, Latent]:
    """What the VAE shows of a picture whose latent is offset, in deviations of its posterior; and that latent."""
    with torch.no_grad():
        posterior = vae.encode(2 * grey - 1).latent_dist
    latent = posterior.mean + posterior.std * offset
    return vae.decode(latent).sample / 2 + 0.5, latent


class TransparentPair(nn.Module):
    """Encoder and decoder; the VAE between them is not part of it."""

    def __init__(self, vae: AutoencoderKL, encoder_widths: Sequence[int], decoder_widths: Sequence[int]) -> None:
        super().__init__()
        channels = vae.config.latent_channels
        attends = [level >= len(decoder_widths) - ATTENDING for level in range(len(decoder_widths))]
        self.encoder = TransparentEncoder([4, *encoder_widths, channels])
        self.decoder = TransparentDecoder(decoder_widths, 2, attends, 3, channels, 4)
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
        seen, latent = there_and_back(self.vae, grey, OFFSET_SCALE * self.encoder(truth))
        return truth, self.decoder(seen, latent), grey, seen

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


def premultiplied(argb: Argb) -> Tensor:
    """As the PatchGAN sees it: colour only where there is something."""
    return torch.cat([argb[:, :1], argb[:, 1:] * argb[:, :1]], dim=1)


# --- training ---


@dataclass
class Trainer:
    settings: Settings
    accelerator: Accelerator
    pair: Any
    critic: Any
    averaged: AveragedModel
    of_pair: Any
    of_critic: Any
    step: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]

    def learn(self, rgba: Rgba) -> dict[str, float]:
        """One step. The losses, unweighted."""
        truth, answer, grey, seen = self.pair(rgba)
        losses = {"reconstruction": F.mse_loss(answer, truth), "identity": F.mse_loss(seen, grey)}
        total = losses["reconstruction"] + self.settings.identity * losses["identity"]
        if self.step >= self.settings.adversarial_from:
            self.critic.requires_grad_(False)
            losses["adversarial"] = -self.critic(premultiplied(answer)).mean()
            total = total + self.settings.adversarial * losses["adversarial"]
            self.critic.requires_grad_(True)
        self._descend(total, self.of_pair, self.pair)
        if "adversarial" in losses:
            real, made = (self.critic(premultiplied(each.detach())) for each in (truth, answer))
            losses["critic"] = F.relu(1 - real).mean() + F.relu(1 + made).mean()
            self._descend(losses["critic"], self.of_critic, self.critic)
        if self.accelerator.sync_gradients:
            self.averaged.update_parameters(self.accelerator.unwrap_model(self.pair))
            self.step += 1
        return {name: loss.item() for name, loss in losses.items()}

    def _descend(self, loss: Tensor, optimizer: Any, net: nn.Module) -> None:
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def shown(self, rgba: Rgba) -> Tensor:
        """Truth, answer of the averaged weights, and what the frozen decoder shows, side by side: [3, H, W]."""
        truth, answer, _, seen = self.averaged.module(rgba[:1])
        checks = checkerboard(*rgba.shape[2:]).to(rgba)
        pictures = [compose(argb[:, [1, 2, 3, 0]].clamp(0, 1), checks) for argb in (truth, answer)]
        return torch.cat([*pictures, seen.clamp(0, 1)], dim=3)[0].float()

    def export(self) -> None:
        """The averaged weights in half precision, under the names that the extension looks for."""
        folder = Path(self.settings.output)
        for part in ("encoder", "decoder"):
            net = getattr(self.averaged.module, part)
            tensors = {key: value.half().contiguous().cpu() for key, value in net.state_dict().items()}
            save_file(tensors, folder / f"vae_transparent_{part}.safetensors")


def make_trainer(settings: Settings, accelerator: Accelerator) -> Trainer:
    vae = load_vae(settings.vae).to(accelerator.device)
    pair = TransparentPair(vae, settings.encoder_widths, settings.decoder_widths)
    if settings.checkpointing:
        pair.checkpointed()
    pair.to(accelerator.device)
    critic = patch_gan()
    averaged = AveragedModel(pair, multi_avg_fn=get_ema_multi_avg_fn(settings.ema))
    optimizers = [torch.optim.AdamW(net.parameters(), settings.rate) for net in (pair, critic)]
    trainer = Trainer(
        settings, accelerator, *accelerator.prepare(pair, critic), averaged, *accelerator.prepare(*optimizers)
    )
    accelerator.register_for_checkpointing(averaged, trainer)
    return trainer


def batches(settings: Settings, accelerator: Accelerator) -> Iterator[Rgba]:
    """Without end, in an order of their own in every round."""
    dataset = open_source(settings.data, settings.size)
    has_length = hasattr(dataset, "__len__")
    loader = DataLoader(dataset, settings.batch, shuffle=has_length, num_workers=settings.workers, drop_last=has_length)
    loader = accelerator.prepare(loader)
    while True:
        for batch in loader:
            yield batch["rgba"]


def train(settings: Settings) -> None:
    accelerator = Accelerator(
        mixed_precision=settings.precision,
        gradient_accumulation_steps=settings.accumulate,
        log_with="tensorboard",
        project_dir=settings.output,
    )
    set_seed(settings.seed, device_specific=True)
    trainer = make_trainer(settings, accelerator)
    state = Path(settings.output) / "state"
    if state.exists():
        accelerator.load_state(str(state))
    accelerator.init_trackers("log", {key: str(value) for key, value in asdict(settings).items()})
    for rgba in batches(settings, accelerator):
        if trainer.step >= settings.steps:
            break
        with accelerator.accumulate(trainer.pair, trainer.critic):
            losses = trainer.learn(rgba)
        accelerator.log(losses, trainer.step)
        if trainer.step % settings.save_every == 0 and accelerator.sync_gradients:
            accelerator.save_state(str(state))
            for tracker in accelerator.trackers:
                tracker.log_images({"truth, answer, frozen decoder": trainer.shown(rgba)[None]}, trainer.step)
    if accelerator.is_main_process:
        trainer.export()
    accelerator.end_training()


def parse(arguments: Sequence[str] | None = None) -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = get_type_hints(Settings)
    for field in fields(Settings):
        option, about = f"--{field.name.replace('_', '-')}", {"help": HELP.get(field.name)}
        if kinds[field.name] is bool:
            parser.add_argument(option, action="store_true", **about)
        elif isinstance(field.default, tuple):
            parser.add_argument(option, type=int, nargs="+", default=field.default, **about)
        elif isinstance(field.default, (int, float, str)):
            parser.add_argument(option, type=kinds[field.name], default=field.default, **about)
        else:
            parser.add_argument(option, required=True, **about)
    return Settings(**vars(parser.parse_args(arguments)))


if __name__ == "__main__":
    train(parse())
