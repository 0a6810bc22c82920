"""Training of a UNet on latents, whatever of it learns: what the trainers of injections and of whole models share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, StableDiffusionXLPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from lib_layerdiffuse.images.rgba import GREY, compose
from lib_layerdiffuse.methods import Layer
from lib_layerdiffuse.tensors import Latent, Rgba
from lib_layerdiffuse.vae import TransparentVAE
from training.trainer import Settings, Trainer

MIDDLE = 500  # of 1000 timesteps: from so much noise, TensorBoard's pictures are guessed


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings(Settings):
    """The options of trainers of UNets."""

    unconditional: float = 0.1
    noise_offset: float = 0.0


HELP = {
    "unconditional": "share of the samples whose captions are left out, for CFG",
    "noise_offset": "deviation of what is added to a whole channel's noise: its mean says nothing of colours then",
}


class Example(TypedDict):
    """Encoded samples: b of them, f pictures each."""

    latents: Tensor  # [b, f, C, H/8, W/8], sampler space
    captions: list[list[str]]  # f lists of b
    condition: Tensor  # [b, C, …], what the injection reads; [b, 0] where it reads nothing


class Encoder:
    """From pictures to what a UNet learns from. encodes: the transparent encoder, where foregrounds are made."""

    def __init__(
        self, pipeline: Any, encodes: TransparentVAE | None, inputs: Sequence[Layer], outputs: Sequence[Layer]
    ):
        self.vae, self.encodes, self.inputs, self.outputs = pipeline.vae, encodes, inputs, outputs
        self.reads_latents = isinstance(pipeline, StableDiffusionXLPipeline)

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Any]) -> Example:
        """batch: for each layer, {"rgba": [b, 4, H, W], "caption": b texts}."""
        rgba = {layer: batch[layer.value]["rgba"].to(self.vae.device) for layer in {*self.inputs, *self.outputs}}
        latents = [self._latent(rgba[layer], self.encodes if layer is Layer.FG else None) for layer in self.outputs]
        read = self._latent if self.reads_latents else lambda picture: compose(picture, GREY)
        condition = [read(rgba[layer]) for layer in self.inputs]
        return {
            "latents": torch.stack(latents, dim=1),
            "captions": [batch[layer.value]["caption"] for layer in self.outputs],
            "condition": torch.cat(condition, dim=1) if condition else latents[0].new_empty(len(latents[0]), 0),
        }

    def _latent(self, rgba: Rgba, encodes: TransparentVAE | None = None) -> Latent:
        """In sampler space."""
        posterior = self.vae.encode((2 * compose(rgba, GREY) - 1).to(self.vae.dtype)).latent_dist
        offset = posterior.std * encodes.encode(rgba) if encodes else 0
        return (posterior.mean + offset).float() * self.vae.config.scaling_factor


class DiffusionTrainer(Trainer):
    """net: (noisy, timesteps, context, added, condition) -> the UNet's answer, for rows [(b f), …]."""

    settings: DiffusionSettings

    def __init__(
        self, settings: DiffusionSettings, accelerator: Accelerator, net: nn.Module, pipeline: Any, encoder: Encoder
    ) -> None:
        super().__init__(settings, accelerator, net)
        self.pipeline = pipeline
        self.encoder = encoder
        self.noise = DDPMScheduler.from_config(pipeline.scheduler.config)

    def prepare(self, batch: Any) -> Example:
        return batch if "latents" in batch else self.encoder(batch)

    def losses(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        example = self.prepare(batch)
        latents = example["latents"]
        timesteps = torch.randint(self.noise.config.num_train_timesteps, (len(latents),), device=latents.device)
        loss = F.mse_loss(*self.answer(example, timesteps)[:2])
        return loss, {"loss": loss}

    def answer(self, example: Example, timesteps: Tensor) -> tuple[Tensor, Tensor, Latent]:
        """The UNet's answer, what it should be, and what it saw, for rows [(b f), …]. timesteps: [b]."""
        frames = example["latents"].shape[1]
        latents, timesteps = example["latents"].flatten(0, 1), timesteps.repeat_interleave(frames)
        noise = torch.randn_like(latents) + self.settings.noise_offset * torch.randn_like(latents[..., :1, :1])
        noisy = self.noise.add_noise(latents, noise, timesteps)
        left_out = torch.rand(len(example["latents"])) < self.settings.unconditional
        captions = ["" if out else caption for out, row in zip(left_out, zip(*example["captions"])) for caption in row]
        context, added = read_prompts(self.pipeline, captions, noisy)
        answer = self.net(noisy, timesteps, context, added, example["condition"])
        by_velocity = self.noise.config.prediction_type == "v_prediction"
        goal = self.noise.get_velocity(latents, noise, timesteps) if by_velocity else noise
        return answer.float(), goal, noisy

    def pictures(self, batch: Any) -> dict[str, Tensor]:
        """What it takes the first sample for, half-way from noise, through the frozen VAE: frames side by side."""
        example = self.prepare(batch)
        one: Example = {
            "latents": example["latents"][:1],
            "captions": [of_layer[:1] for of_layer in example["captions"]],
            "condition": example["condition"][:1],
        }
        timestep = torch.tensor([MIDDLE], device=one["latents"].device)
        answer, _, noisy = self.answer(one, timestep)
        guess = torch.cat(
            [self.noise.step(a[None], MIDDLE, x[None]).pred_original_sample for a, x in zip(answer, noisy)]
        )
        vae = self.pipeline.vae
        shown = vae.decode((guess / vae.config.scaling_factor).to(vae.dtype)).sample / 2 + 0.5
        return {"guesses": torch.cat(list(shown.float().clamp(0, 1)), dim=2)}


def read_prompts(pipeline: Any, captions: Sequence[str], noisy: Tensor) -> tuple[Tensor, dict[str, Tensor] | None]:
    """The UNet's context, and what SDXL adds to its timesteps: the pooled text, and that nothing was cut off."""
    options = {"device": noisy.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if not isinstance(pipeline, StableDiffusionXLPipeline):
        return pipeline.encode_prompt(captions, **options)[0], None
    context, _, pooled, _ = pipeline.encode_prompt(captions, **options)
    if pipeline.config.force_zeros_for_empty_prompt:
        said = torch.tensor([bool(caption) for caption in captions], device=noisy.device)
        context, pooled = context * said[:, None, None], pooled * said[:, None]
    height, width = (8 * side for side in noisy.shape[2:])
    sizes = noisy.new_tensor([height, width, 0, 0, height, width]).expand(len(noisy), -1)
    return context, {"text_embeds": pooled, "time_ids": sizes}
