"""diffusers, without a web UI: an SD1.5 or SDXL model in its folder form, as a single file, or by its hub name.

Names and classes are those of diffusers 0.29 and newer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from torch import Tensor, nn

from lib_layerdiffuse.engine.backend import BaseModel
from lib_layerdiffuse.engine.prompts import in_chunks
from lib_layerdiffuse.engine.runner import Sampling
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.injection.content import UNSHARED, Injection, WeightPatch, misfit
from lib_layerdiffuse.injection.patches import (
    FIRST_BLOCK,
    ControlSignals,
    Key,
    SharedLayers,
    Switch,
    add_to_rows,
    condition_patch,
)
from lib_layerdiffuse.methods import Family
from lib_layerdiffuse.nets.attention_sharing import ATTENTIONS, BLOCKS, FoldedSharing
from lib_layerdiffuse.tensors import Latent, Rgb, Tokens
from lib_layerdiffuse.vae import LATENT_STRIDE
from lib_layerdiffuse.weights.checkpoints import family_of

log = logging.getLogger("layerdiffuse")

PIPELINES = {Family.SD15: StableDiffusionPipeline, Family.SDXL: StableDiffusionXLPipeline}
IMG2IMG = {Family.SD15: StableDiffusionImg2ImgPipeline, Family.SDXL: StableDiffusionXLImg2ImgPipeline}

# What a UNet's parts are called in checkpoints, where the two differ.
OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
OF_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


# As web UIs call them.
SAMPLERS = {
    "Euler": EulerDiscreteScheduler,
    "Euler a": EulerAncestralDiscreteScheduler,
    "DPM++ 2M": DPMSolverMultistepScheduler,
    "DDIM": DDIMScheduler,
    "UniPC": UniPCMultistepScheduler,
}
AT_FIRST = {"block": FIRST_BLOCK}

HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
MODEL_ENDINGS = (".safetensors", ".ckpt", ".gguf", ".pt", ".pth", ".bin")  # of single files; hub names may have dots

EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def parts_of(unet: Any) -> dict[str, str]:
    """The UNet's resnets, transformers and outer layers -> what checkpoints call them."""
    parts = dict(OUTER)
    stride = unet.config.layers_per_block + 1  # positions for each level
    for level, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            at = f"input_blocks.{level * stride + layer + 1}"
            parts |= {f"down_blocks.{level}.resnets.{layer}": f"{at}.0"}
            parts |= {f"down_blocks.{level}.attentions.{layer}": f"{at}.1"}
        parts[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(level + 1) * stride}.0.op"
    for level, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            at = f"output_blocks.{level * stride + layer}"
            parts |= {f"up_blocks.{level}.resnets.{layer}": f"{at}.0"}
            parts |= {f"up_blocks.{level}.attentions.{layer}": f"{at}.1"}
        behind = 2 if hasattr(block, "attentions") else 1
        parts[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{(level + 1) * stride - 1}.{behind}.conv"
    return parts


def checkpoint_keys(unet: Any) -> dict[str, str]:
    """The UNet's parameters -> their keys in checkpoints (`diffusion_model.…`)."""
    parts = parts_of(unet)
    keys = {}
    for name, _ in unet.named_parameters():
        if ".lora_" in name:  # of peft, beside the weight that it wraps as `base_layer`
            continue
        part = next(part for part in parts if name.startswith(f"{part}."))
        rest = name[len(part) + 1 :].replace("base_layer.", "")
        if ".resnets." in part:
            layer, _, kind = rest.partition(".")
            rest = f"{OF_RESNET[layer]}.{kind}"
        keys[name] = f"diffusion_model.{parts[part]}.{rest}"
    return keys


def attentions_of(unet: Any) -> dict[Key, Any]:
    """The attention layers that SD1.5 files have units for."""
    names = {at: part for part, at in parts_of(unet).items()}
    places = {
        block: "middle_block.1" if block[0] == "middle" else f"{block[0]}_blocks.{block[1]}.1" for block in BLOCKS
    }
    transformers = {block: unet.get_submodule(names[at]).transformer_blocks[0] for block, at in places.items()}
    return {(name, block): getattr(transformers[block], name) for block in BLOCKS for name in ATTENTIONS}


class DiffusersBackend:
    """See `runner.SamplingBackend`."""

    samplers: Collection[str] = tuple(SAMPLERS)

    def __init__(self, pipeline: Any, name: str = "the model") -> None:
        self.pipeline = pipeline
        self.name = name
        pipeline.vae.to(torch.float32)  # SDXL's overflows in half precision
        self.family = Family.SDXL if isinstance(pipeline, StableDiffusionXLPipeline) else Family.SD15

    @classmethod
    def load(cls, model: str | Path, family: Family, **more: Any) -> DiffusersBackend:
        """A model of that family; more: what diffusers' own loader takes too.

        Raises LayerDiffuseError where it is of another, or cannot be loaded.
        """
        path = Path(model)
        more = {"torch_dtype": torch.float32, **more}  # or each part would have that of its file
        for each in filter(None, (model, more.get("config"))):
            check_there(each)
        with loading(model if path.exists() else f"{model} (from Hugging Face, as it is not here)"):
            if path.is_file():
                check_file(path, family)
                return cls(PIPELINES[family].from_single_file(str(model), **more), str(model))
            pipeline = DiffusionPipeline.from_pretrained(str(model), **more)
        if not isinstance(pipeline, PIPELINES[family]):
            raise LayerDiffuseError(
                f"{model} is a {type(pipeline).__name__}, but this needs {family.word}. Choose another model or method."
            )
        return cls(pipeline, str(model))

    @classmethod
    def load_world(cls, folder: Path, family: Family) -> DiffusersBackend:
        """A model of the tiny world, both of which have one VAE. Raises LayerDiffuseError where it is not there."""
        if not (folder / family.value).is_dir():
            raise LayerDiffuseError(f"There is no model of {family.word} in {folder}. Name one with --model.")
        with loading(folder):
            vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32)
            return cls(PIPELINES[family].from_pretrained(folder / family.value, vae=vae, torch_dtype=torch.float32))

    def base_model(self) -> BaseModel:
        return BaseModel(self.name, f"an {self.family.word} checkpoint", self.family)

    @property
    def usual_size(self) -> int:
        return self.unet.config.sample_size * LATENT_STRIDE

    @property
    def unet(self) -> Any:
        return self.pipeline.unet

    @torch.no_grad()
    def posterior(self, rgb: Rgb) -> tuple[Latent, Latent]:
        vae = self.pipeline.vae
        found = vae.encode((2 * rgb - 1).to(vae.device, vae.dtype)).latent_dist
        return found.mean.float(), found.std.float()

    @torch.no_grad()
    def pixels(self, vae_latent: Latent) -> Rgb:
        vae = self.pipeline.vae
        return (vae.decode(vae_latent.to(vae.device, vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    def sampler_latent(self, vae_latent: Latent) -> Latent:
        return vae_latent * self.pipeline.vae.config.scaling_factor

    def vae_latent(self, sampler_latent: Latent) -> Latent:
        return sampler_latent / self.pipeline.vae.config.scaling_factor

    def sample(self, sampling: Sampling, start: Latent | None = None) -> Latent:
        pipeline = self.pipeline
        options: dict[str, Any] = {"width": sampling.width, "height": sampling.height}
        if start is not None:
            pipeline = IMG2IMG[self.family](**pipeline.components)
            options = {"image": start.to(self.unet.device, self.unet.dtype), "strength": sampling.strength}
        config = {**pipeline.scheduler.config, "clip_sample": False}  # of DDIM: to the range of pixels
        pipeline.scheduler = SAMPLERS[sampling.sampler].from_config(config)
        return pipeline(
            **self.embeddings(sampling.prompts, sampling.negative),
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.cfg,
            generator=[torch.Generator().manual_seed(seed) for seed in sampling.seeds],
            output_type="latent",
            **options,
        ).images.float()

    @torch.no_grad()
    def embeddings(self, prompts: Sequence[str], negative: str) -> dict[str, Tensor]:
        """What the pipeline takes in place of the words: long texts in chunks, one behind the other, as web UIs do.

        What there is of a whole text (SDXL) is that of its first chunk.
        """
        tokenizer = self.pipeline.tokenizer
        most = tokenizer.model_max_length - 2  # start and end take a place each

        def fits(text: str) -> bool:
            return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids) <= most

        columns = [in_chunks(text, fits) for text in (*prompts, negative)]
        found = [
            self.pipeline.encode_prompt(
                prompt=list(texts[:-1]),
                negative_prompt=[texts[-1]] * len(prompts),
                device=self.unet.device,
                num_images_per_prompt=1,
                do_classifier_free_guidance=True,
            )
            for texts in zip_longest(*columns, fillvalue="")
        ]
        return {
            name: chunks[0] if "pooled" in name else torch.cat(chunks, dim=1)
            for name, chunks in zip(EMBEDDINGS, zip(*found))
        }

    @contextmanager
    def inject(
        self, injection: Injection, weight: float, start: float, stop: float, condition: Tensor | None
    ) -> Iterator[None]:
        steps = self.pipeline.scheduler.config.num_train_timesteps
        content = injection.content
        with ExitStack() as afterwards:
            if isinstance(content, WeightPatch):
                turn = patch_weights(self.unet, injection, content, weight)
            else:
                turn = share(self.unet, injection, content, weight, condition)
            # By timesteps, which are ordered as noise levels are.
            switch = Switch(inf if start == 0 else (1 - start) * steps, (1 - stop) * steps, turn, on=False)
            afterwards.callback(turn, False)
            hooks = [self.unet.register_forward_pre_hook(each_step(switch))]
            if isinstance(content, WeightPatch) and content.condition is not None and condition is not None:
                add = condition_patch(content.condition, condition, weight, switch).call
                hooks.append(self.unet.conv_in.register_forward_hook(lambda module, inputs, h: add(h, AT_FIRST)))
            for hook in hooks:
                afterwards.callback(hook.remove)
            yield

    @contextmanager
    def hold(self, original: Latent, noise: Latent, released: Callable[[float], Tensor]) -> Iterator[None]:
        # Whatever the scheduler, the UNet reads x = √ᾱ·x0 + √(1-ᾱ)·ε and answers ε or v = √ᾱ·ε - √(1-ᾱ)·x0.
        scheduler = self.pipeline.scheduler
        sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().tolist()
        velocity = scheduler.config.prediction_type == "v_prediction"
        held: list[Tensor] = []  # of the call under way: what is free, and the answer that leads to the original

        def before(unet: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, timestep, *rest = inputs
            sigma = float(np.interp(timestep_of(timestep), range(len(sigmas)), sigmas))
            signal, spread = (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5
            free = released(sigma).to(x.device).repeat(len(x) // len(original), 1, 1, 1)
            start, added = (each.to(x).repeat(len(x) // len(each), 1, 1, 1) for each in (original, noise))
            epsilon = (x - signal * start) / spread
            held[:] = free, signal * epsilon - spread * start if velocity else epsilon
            return torch.where(free, x, signal * start + spread * added), timestep, *rest

        def after(unet: Any, inputs: Any, answer: Any) -> Any:
            free, towards = held
            answer[0].copy_(torch.where(free, answer[0], towards))

        hooks = self.unet.register_forward_pre_hook(before), self.unet.register_forward_hook(after)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def places(self, module: nn.Module, memory: int) -> Iterator[torch.device]:
        device = self.unet.device
        module.to(self.unet.dtype)
        yield device
        if device.type != "cpu":
            log.info("out of memory: once more on the CPU")
            module.float()
            yield torch.device("cpu")

    def forget(self, injection: Injection) -> None:
        """Nothing of it is loaded but itself."""


def check_there(model: str | Path) -> None:
    """Raises LayerDiffuseError where it is neither here nor could be a name on Hugging Face."""
    name = str(model)
    if Path(model).exists() or (HUB_NAME.fullmatch(name) and not name.lower().endswith(MODEL_ENDINGS)):
        return
    raise LayerDiffuseError(
        f"{name} cannot be loaded: there is no such file or folder. Choose one that is there, or name a model on "
        "Hugging Face as owner/name."
    )


@contextmanager
def loading(model: str | Path) -> Iterator[None]:
    """While open, whatever a damaged model makes the libraries raise is a sentence: they have many kinds of errors."""
    try:
        yield
    except (ImportError, LayerDiffuseError):
        raise
    except Exception as error:
        log.info("loading %s", model, exc_info=error)
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise LayerDiffuseError(f"{model} cannot be loaded: {reason}") from error


def check_file(path: Path, family: Family) -> None:
    found = family_of(path)
    if found is not family:
        kind = f"an {found.word} checkpoint" if found else "no plain SD1.5 or SDXL checkpoint in safetensors form"
        raise LayerDiffuseError(f"{path} is {kind}, but this needs {family.word}. Choose another model or method.")


def each_step(switch: Switch) -> Callable[..., None]:
    """A hook of the UNet that tells the switch where sampling is."""

    def hook(unet: Any, inputs: tuple[Any, ...]) -> None:
        switch.at(timestep_of(inputs[1]))

    return hook


def timestep_of(given: Any) -> float:
    """One for all rows, as a number or in a tensor; between two of those in training, where the scheduler says so."""
    return float(torch.as_tensor(given).flatten()[0])


def patch_weights(unet: Any, injection: Injection, patch: WeightPatch, weight: float) -> Callable[[bool], None]:
    """What puts LoRA and diff into the UNet's weights, and takes them out again. They are merged when first put in."""
    found = {key: unet.get_parameter(name) for name, key in checkpoint_keys(unet).items()}
    if reason := patch.misfit(found):
        raise misfit(injection.method, reason)
    own = {key: found[key] for key in patch.shapes()}
    plain = {key: weight.data for key, weight in own.items()}
    merged: dict[str, Tensor] = {}

    def addition(key: str) -> Tensor:
        if key in patch.diff:
            return patch.diff[key].float()
        up, down = patch.lora[key]
        return (up.float() @ down.float()).view(plain[key].shape)

    def turn(on: bool) -> None:
        if on and not merged:
            merged.update(
                {key: (was.float() + weight * addition(key).to(was.device)).to(was) for key, was in plain.items()}
            )
        for key, parameter in own.items():
            parameter.data = (merged if on else plain)[key]

    return turn


def share(
    unet: Any, injection: Injection, sharing: FoldedSharing, weight: float, picture: Rgb | None
) -> Callable[[bool], None]:
    """What puts the units in the places of the UNet's attention layers, and the layers back."""
    try:
        attentions = attentions_of(unet)
    except (AttributeError, KeyError) as error:
        raise misfit(injection.method, UNSHARED) from error
    sharing.to(unet.device)
    layers = SharedLayers(
        sharing, {key: as_host(each) for key, each in attentions.items()}, weight, version=lambda: None
    )
    controls = ControlSignals(sharing, picture, weight)
    plain = {key: each.processor for key, each in attentions.items()}
    shared = {key: SharedAttention(key, layers, controls) for key in attentions}

    def turn(on: bool) -> None:
        for key, each in attentions.items():
            each.processor = (shared if on else plain)[key]

    return turn


def as_host(attention: Any) -> Any:
    """An attention layer of diffusers under the names that units know."""
    names = ("to_q", "to_k", "to_v", "heads")
    return SimpleNamespace(**{name: getattr(attention, name) for name in names}, to_out=attention.to_out[0])


class SharedAttention:
    """In the place of an attention layer's processor."""

    def __init__(self, key: Key, layers: SharedLayers, controls: ControlSignals) -> None:
        self._key, self._layers, self._controls = key, layers, controls

    def __call__(self, attention: Any, h: Tokens, encoder_hidden_states: Tokens | None = None, **_: Any) -> Tokens:
        control = self._controls.at(self._key, h)
        x = h if control is None else add_to_rows(h, control)
        text = None if encoder_hidden_states is None else self._layers.text(encoder_hidden_states)
        context = x if text is None else text
        answer = self._layers.at(self._key, x)(x, context, context)
        return answer if control is None else add_to_rows(answer, control)
