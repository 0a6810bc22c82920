"""A model that Stable Diffusion WebUI Forge 2 loaded (its package `backend`): lllyasviel/stable-diffusion-webui-forge.

File and line in comments are of commit dfdcbab6.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from weakref import ref

import torch
from backend import memory_management
from backend.patcher.base import ModelPatcher
from backend.patcher.lora import load_lora
from torch import Tensor, nn

from lib_layerdiffuse.engine.backend import BaseModel
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.injection.content import UNSHARED, Injection, WeightPatch, misfit
from lib_layerdiffuse.injection.patches import (
    ControlSignals,
    Key,
    Patch,
    SharedLayers,
    Switch,
    attention_patches,
    condition_patch,
    control_patches,
)
from lib_layerdiffuse.methods import Family
from lib_layerdiffuse.nets.attention_sharing import ATTENTIONS, BLOCKS, FoldedSharing
from lib_layerdiffuse.tensors import Latent, Rgb

log = logging.getLogger("layerdiffuse")

# The engine's flag, what it says, and the family that LayerDiffuse has weights for.
KINDS = (
    ("is_sd1", "an SD1.5", Family.SD15),
    ("is_sdxl", "an SDXL", Family.SDXL),
    ("is_sd2", "an SD2", None),
    ("is_sd3", "an SD3", None),
)
OTHER_KIND = ("", "a Flux or other", None)
REFINER_CONTEXT = 1280  # width of the text context of the SDXL refiner; the base model has 2048


class ForgeBackend:
    """See `backend.Backend`."""

    def __init__(self, model: Callable[[], Any]) -> None:
        """model: the checkpoint (`ForgeDiffusionEngine`) that is loaded when it is called."""
        self._current = model

    @property
    def _model(self) -> Any:
        return self._current()

    def base_model(self) -> BaseModel:
        model = self._model
        _, kind, family = next((row for row in KINDS if getattr(model, row[0], False)), OTHER_KIND)
        refiner = getattr(model.model_config, "unet_config", {}).get("context_dim") == REFINER_CONTEXT
        special = "inpainting " * model.is_inpaint + "refiner " * refiner
        name = model.sd_checkpoint_info.name_for_extra
        return BaseModel(name, f"{kind} {special}checkpoint", None if special else family)

    def posterior(self, rgb: Rgb) -> tuple[Latent, Latent]:
        vae = self._model.forge_objects.vae.clone()
        encode = vae.first_stage_model.encode
        # Not the VAE's regulation, which its tiled mode leaves out (backend/patcher/vae.py:118).
        vae.first_stage_model = SimpleNamespace(encode=lambda pixels, regulation=None: encode(pixels, parameters_of))
        vae.latent_channels *= 2
        mean, std = vae.encode(rgb.movedim(1, -1)).chunk(2, dim=1)
        return mean, std

    def sampler_latent(self, vae_latent: Latent) -> Latent:
        return self._model.forge_objects.vae.first_stage_model.process_in(vae_latent)

    def vae_latent(self, sampler_latent: Latent) -> Latent:
        return self._model.forge_objects.vae.first_stage_model.process_out(sampler_latent)

    @contextmanager
    def inject(
        self, injection: Injection, weight: float, start: float, stop: float, condition: Tensor | None
    ) -> Iterator[None]:
        objects = self._model.forge_objects
        unet = objects.unet.clone()
        plain = merged = dict(unet.lora_patches)
        # Weakly, because it holds `merge`: together they would keep gigabytes until the next garbage collection.
        patcher = ref(unet)

        def merge(on: bool) -> None:
            began = time.perf_counter()
            unet: Any = patcher()
            unet.lora_patches = merged if on else plain
            unet.lora_loader.refresh(unet.lora_patches, offload_device=unet.offload_device)
            log.info("switched %s in %.2f s", "on" if on else "off", time.perf_counter() - began)

        begin, end = map(unet.model.predictor.percent_to_sigma, (start, stop))
        switch = Switch(begin, end, merge, on=start == 0)
        afterwards = ExitStack()
        if isinstance(injection.content, WeightPatch):
            patch_weights(unet, injection, injection.content, weight)
            merged = unet.lora_patches
            if not switch.on:  # merged when it is time
                unet.lora_patches = plain
            patches = condition_patches(injection.content, condition, weight, switch)
        else:
            hosts = attentions_of(unet, injection)
            patches = sharing_patches(unet, hosts, injection.content, condition, weight, switch, afterwards)
        add_patches(unet, patches)
        unet.add_conditioning_modifier(each_step(switch))
        # Not put back afterwards: the host drops it at its next reset (processing.py:937), and a patcher that nothing
        # refers to any more is forgotten by its memory management while the model still is on the GPU.
        objects.unet = unet
        try:
            with afterwards:
                yield
        except BaseException:
            # A merge that broke off is neither undone nor noticed by the host (backend/patcher/lora.py:354).
            unet.lora_loader.refresh(plain, offload_device=unet.offload_device, force_refresh=True)
            raise

    @contextmanager
    def hold(self, original: Latent, noise: Latent, released: Callable[[float], Tensor]) -> Iterator[None]:
        objects = self._model.forge_objects
        unet = objects.unet.clone()
        with_noise = unet.model.predictor.noise_scaling
        free: Tensor | None = None  # at the model call under way

        def before(model: Any, x: Latent, timestep: Any, uncond: Any, cond: Any, *rest: Any) -> tuple[Any, ...]:
            nonlocal free
            free = released(float(timestep[0])).to(x.device).expand(len(x), -1, -1, -1)
            kept = with_noise(timestep[:, None, None, None], noise.to(x), original.to(x))
            for condition in (*(uncond or ()), *cond):
                release_inpainting(condition["model_conds"], original, free)
            return model, torch.where(free, x, kept), timestep, uncond, cond, *rest

        def after(args: Mapping[str, Any]) -> Latent:
            assert free is not None, "an answer of the UNet before its call"
            return torch.where(free, args["denoised"], original.to(args["denoised"]))

        unet.add_conditioning_modifier(before)
        unet.set_model_sampler_post_cfg_function(after)
        objects.unet = unet
        yield

    def places(self, module: nn.Module, memory: int) -> Iterator[torch.device]:
        patcher = patcher_of(module, dtype_for(memory_management.get_torch_device()))
        memory_management.load_models_gpu([patcher], memory_required=memory)
        yield patcher.load_device
        if memory_management.is_device_cpu(patcher.load_device):
            return
        log.info("out of memory: once more with nothing else on the GPU")
        memory_management.unload_all_models()
        memory_management.load_models_gpu([patcher], memory_required=memory)
        yield patcher.load_device
        log.info("out of memory: once more on the CPU")
        memory_management.unload_all_models()
        dtype = next(module.parameters()).dtype
        module.float()
        try:
            yield torch.device("cpu")
        finally:
            module.to(dtype)

    def forget(self, injection: Injection) -> None:
        # What refers back to the module would keep it, a gigabyte on a CPU, until the next garbage collection: its
        # patcher, and what the host's patcher puts on it (backend/patcher/base.py:64).
        attributes = vars(injection.content)
        if patcher := attributes.pop("host_patcher", None):
            memory_management.unload_model_clones(patcher)
            del attributes["lora_loader"]


def release_inpainting(conditions: dict[str, Any], original: Latent, free: Tensor) -> None:
    """Tell an inpainting checkpoint what is masked now: its mask, and the latents of the picture without that part."""
    if mask_and_latents := conditions.get("c_concat"):
        latents = mask_and_latents.cond[:, 1:]
        now = torch.cat([free.to(latents), torch.where(free, latents, original.to(latents))], dim=1)
        conditions["c_concat"] = type(mask_and_latents)(now)


def each_step(switch: Switch) -> Callable[..., tuple[Any, ...]]:
    """A conditioning modifier that changes nothing and tells the switch where sampling is."""

    def modifier(model: Any, x: Any, timestep: Any, *rest: Any) -> tuple[Any, ...]:
        switch.at(float(timestep[0]))
        return model, x, timestep, *rest

    return modifier


def patch_weights(unet: Any, injection: Injection, patch: WeightPatch, weight: float) -> None:
    """Hand LoRA and diff to the host's own patcher, and make sure that it takes all of them."""
    refuse_unfit(unet, injection, patch)
    files = {
        f"{key}.lora_{name}.weight": t for key, pair in patch.lora.items() for name, t in zip(("up", "down"), pair)
    }
    patches, _ = load_lora(files, {key: key for key in patch.lora})
    patches |= {key: ("diff", (diff,)) for key, diff in patch.diff.items()}
    applied = unet.add_patches(filename=f"layerdiffuse {injection.identity}", patches=patches, strength_patch=weight)
    if lost := patch.shapes().keys() - applied:
        raise misfit(injection.method, f"Forge took no patch for {len(lost)} of its weights, such as {min(lost)}")
    if unet.lora_loader.loaded_hash != str(list(unet.lora_patches)):  # what the host compares before it merges
        log.info("merging %s at weight %g", injection.method.weights, weight)


def refuse_unfit(unet: Any, injection: Injection, patch: WeightPatch) -> None:
    """Before the host touches a weight: it would stop half-way, and leave the first half merged."""
    found = dict(unet.model.named_parameters())
    if any(hasattr(weight, mark) for weight in found.values() for mark in ("bnb_quantized", "gguf_cls")):
        raise LayerDiffuseError(
            f"{injection.method.full_title} adds to the weights of the UNet, which is quantised (NF4 or GGUF) in this "
            "checkpoint. Choose a checkpoint in fp16, bf16 or fp8."
        )
    if reason := patch.misfit(found):
        raise misfit(injection.method, reason)


def condition_patches(patch: WeightPatch, latents: Latent | None, weight: float, switch: Switch) -> list[Patch]:
    if patch.condition is None or latents is None:
        return []
    return [condition_patch(patch.condition, latents, weight, switch)]


def attentions_of(unet: Any, injection: Injection) -> dict[Key, nn.Module]:
    """The attention layers that files have units for. Raises LayerDiffuseError where it has others."""
    try:
        return {(name, block): getattr(transformer(unet, block), name) for name in ATTENTIONS for block in BLOCKS}
    except (AttributeError, IndexError) as error:
        raise misfit(injection.method, UNSHARED) from error


def sharing_patches(
    unet: Any,
    hosts: Mapping[Key, nn.Module],
    sharing: FoldedSharing,
    picture: Rgb | None,
    weight: float,
    switch: Switch,
    afterwards: ExitStack,
) -> list[Patch]:
    """The units for the UNet's attention layers, which are loaded together with it."""
    unet.add_extra_model_patcher_during_sampling(patcher_of(sharing, unet.model.computation_dtype))
    loader = unet.lora_loader
    layers = SharedLayers(sharing, hosts, weight, version=lambda: loader.loaded_hash)
    afterwards.callback(layers.clear)  # the patched UNet itself stays until the next job
    control = [] if picture is None else control_patches(ControlSignals(sharing, picture, weight), switch)
    return [*attention_patches(layers, switch), *control]


def add_patches(unet: Any, patches: Sequence[Patch]) -> None:
    lists = unet.model_options["transformer_options"].setdefault("patches", {})
    for patch in patches:
        others = lists.get(patch.kind, [])
        lists[patch.kind] = [patch.call, *others] if patch.first else [*others, patch.call]


def parameters_of(posterior: Any) -> Tensor:
    """A regulation of the host's VAE: both mean and std instead of a sample."""
    return torch.cat([posterior.mean, posterior.std], dim=1)


def transformer(unet: Any, block: tuple[str, int]) -> nn.Module:
    """The host's transformer block: SD1.5 has one for each position, after the ResNet."""
    name, index = block
    model = unet.model.diffusion_model
    stage = model.middle_block if name == "middle" else getattr(model, f"{name}_blocks")[index]
    return stage[1].transformer_blocks[0]


def patcher_of(module: nn.Module, dtype: torch.dtype) -> ModelPatcher:
    """The host's handle for loading `module`, kept on the module: hosts hold handles weakly."""
    module.to(dtype)
    if "host_patcher" not in module.__dict__:
        module.host_patcher = ModelPatcher(
            module,
            load_device=memory_management.get_torch_device(),
            offload_device=memory_management.unet_offload_device(),
        )
    return module.host_patcher


def dtype_for(device: torch.device) -> torch.dtype:
    if memory_management.should_use_fp16(device):
        return torch.float16
    return torch.bfloat16 if memory_management.should_use_bf16(device) else torch.float32
