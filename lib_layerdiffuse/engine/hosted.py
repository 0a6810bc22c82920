"""A model that a web UI loaded, patched through the web UI's own patcher.

File and line in comments are of Forge's commit dfdcbab6 (lllyasviel/stable-diffusion-webui-forge).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lib_layerdiffuse.engine.backend import BaseModel
from lib_layerdiffuse.engine.merging import Merging, merging_of
from lib_layerdiffuse.engine.programs import Program, computation_dtype, schedule_of, with_noise
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
from lib_layerdiffuse.nets.attention_sharing import ATTENTIONS, BLOCKS, FoldedSharing
from lib_layerdiffuse.tensors import Latent, Rgb
from lib_layerdiffuse.weights.checkpoints import FAMILIES, kind_of

log = logging.getLogger("layerdiffuse")


class HostedModel:
    """See `backend.Backend`."""

    def __init__(self, program: Program, model: Callable[[], Any]) -> None:
        """model: the checkpoint that is loaded when it is called, with its `forge_objects`."""
        self._program = program
        self._current = model

    @property
    def _objects(self) -> Any:
        return self._current().forge_objects

    def base_model(self) -> BaseModel:
        model = self._objects.unet.model.diffusion_model
        name = self._current().sd_checkpoint_info.name_for_extra
        found = shape_of(model)
        return BaseModel(name, kind_of(*found), FAMILIES.get(found))

    def posterior(self, rgb: Rgb) -> tuple[Latent, Latent]:
        vae = copy(self._objects.vae)  # not its clone(), in which reForge leaves a part out
        first_stage = vae.first_stage_model
        vae.first_stage_model = SimpleNamespace(encode=lambda pixels, *options: parameters_of(first_stage, pixels))
        vae.latent_channels *= 2
        mean, std = vae.encode(rgb.movedim(1, -1)).chunk(2, dim=1)
        return mean, std

    def sampler_latent(self, vae_latent: Latent) -> Latent:
        return self._space.process_in(vae_latent)

    def vae_latent(self, sampler_latent: Latent) -> Latent:
        return self._space.process_out(sampler_latent)

    @property
    def _space(self) -> Any:
        """What knows the sampler's space: the VAE's network, or the latent format of the UNet's model."""
        first_stage = self._objects.vae.first_stage_model
        return first_stage if hasattr(first_stage, "process_in") else self._objects.unet.model.latent_format

    @contextmanager
    def inject(
        self, injection: Injection, weight: float, start: float, stop: float, condition: Tensor | None
    ) -> Iterator[None]:
        objects = self._objects
        unet = objects.unet.clone()
        merging = merging_of(unet, self._program.memory.load_models_gpu)

        def turn(on: bool) -> None:
            began = time.perf_counter()
            merging.turn(on)
            log.info("switched %s in %.2f s", "on" if on else "off", time.perf_counter() - began)

        begin, end = map(schedule_of(unet.model).percent_to_sigma, (start, stop))
        afterwards = ExitStack()
        if isinstance(injection.content, WeightPatch):
            switch = Switch(begin, end, turn, on=start == 0)
            self._merge(unet, merging, injection, injection.content, weight)
            merging.begin(switch.on)  # else merged when it is time
            patches = condition_patches(injection.content, condition, weight, switch)
        else:
            switch = Switch(begin, end, lambda on: None, on=start == 0)
            hosts = attentions_of(unet, injection)
            unet.add_extra_model_patcher_during_sampling(
                self._patcher(injection.content, computation_dtype(unet.model))
            )
            layers = SharedLayers(injection.content, hosts, weight, merging.version)
            afterwards.callback(layers.clear)  # the patched UNet itself stays until the next job
            patches = sharing_patches(layers, injection.content, condition, weight, switch)
        add_patches(unet, patches)
        unet.add_conditioning_modifier(each_step(switch))
        # Not put back afterwards: the host drops it at its next reset (processing.py:937), and a patcher that nothing
        # refers to any more is forgotten by its memory management while the model still is on the GPU.
        objects.unet = unet
        try:
            with afterwards:
                yield
        except BaseException:
            merging.undo()
            raise

    def _merge(self, unet: Any, merging: Merging, injection: Injection, patch: WeightPatch, weight: float) -> None:
        """Hand LoRA and diff to the host's own patcher, and make sure that it takes all of them."""
        refuse_unfit(unet, injection, patch)
        files = {
            f"{key}.lora_{name}.weight": t for key, pair in patch.lora.items() for name, t in zip(("up", "down"), pair)
        }
        patches = self._program.load_lora(files, list(patch.lora))
        patches |= {key: ("diff", (diff,)) for key, diff in patch.diff.items()}
        taken = merging.add(f"layerdiffuse {injection.identity}", patches, weight)
        if lost := patch.shapes().keys() - taken:
            raise misfit(injection.method, f"the web UI took no patch for {len(lost)} weights, such as {min(lost)}")
        if not merging.is_merged():
            log.info("merging %s at weight %g", injection.method.weights, weight)

    @contextmanager
    def hold(self, original: Latent, noise: Latent, released: Callable[[float], Tensor]) -> Iterator[None]:
        objects = self._objects
        unet = objects.unet.clone()
        schedule = schedule_of(unet.model)
        free: Tensor | None = None  # at the model call under way

        def before(model: Any, x: Latent, timestep: Any, uncond: Any, cond: Any, *rest: Any) -> tuple[Any, ...]:
            nonlocal free
            free = released(float(timestep[0])).to(x.device).expand(len(x), -1, -1, -1)
            kept = with_noise(schedule, timestep[:, None, None, None], noise.to(x), original.to(x))
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
        manager = self._program.memory
        patcher = self._patcher(module, self._program.dtype(manager.get_torch_device()))
        manager.load_models_gpu([patcher], memory_required=memory)
        yield patcher.load_device
        if manager.is_device_cpu(patcher.load_device):
            return
        log.info("out of memory: once more with nothing else on the GPU")
        manager.unload_all_models()
        manager.load_models_gpu([patcher], memory_required=memory)
        yield patcher.load_device
        log.info("out of memory: once more on the CPU")
        manager.unload_all_models()
        dtype = next(module.parameters()).dtype
        module.float()
        try:
            yield torch.device("cpu")
        finally:
            module.to(dtype)

    def forget(self, injection: Injection) -> None:
        # What refers back to the module would keep it, a gigabyte on a CPU, until the next garbage collection: its
        # patcher, and what Forge's patcher puts on it (backend/patcher/base.py:64).
        attributes = vars(injection.content)
        if patcher := attributes.pop("host_patcher", None):
            self._program.forget(patcher)
            attributes.pop("lora_loader", None)

    def _patcher(self, module: nn.Module, dtype: torch.dtype) -> Any:
        """The host's handle for loading `module`, kept on the module: hosts hold handles weakly."""
        module.to(dtype)
        if "host_patcher" not in module.__dict__:
            manager = self._program.memory
            module.host_patcher = self._program.patcher(
                module, load_device=manager.get_torch_device(), offload_device=manager.unet_offload_device()
            )
        return module.host_patcher


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
    layers: SharedLayers, sharing: FoldedSharing, picture: Rgb | None, weight: float, switch: Switch
) -> list[Patch]:
    """The units for the UNet's attention layers."""
    control = [] if picture is None else control_patches(ControlSignals(sharing, picture, weight), switch)
    return [*attention_patches(layers, switch), *control]


def add_patches(unet: Any, patches: Sequence[Patch]) -> None:
    lists = unet.model_options["transformer_options"].setdefault("patches", {})
    for patch in patches:
        others = lists.get(patch.kind, [])
        lists[patch.kind] = [patch.call, *others] if patch.first else [*others, patch.call]


def parameters_of(first_stage: Any, pixels: Tensor) -> Tensor:
    """Mean and std of the posterior, one after the other in channels, instead of a sample: of any AutoencoderKL.

    The log of the variance is bounded as in latent-diffusion (ldm/modules/distributions/distributions.py).
    """
    moments = first_stage.encoder(pixels)
    if getattr(first_stage, "quant_conv", None) is not None:
        moments = first_stage.quant_conv(moments)
    mean, logvar = moments.chunk(2, dim=1)
    return torch.cat([mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))], dim=1)


def shape_of(model: Any) -> tuple[int, int]:
    """Channels that a UNet takes, and the width of its text context; zeros where it is none of Stable Diffusion's."""
    try:
        context = model.input_blocks[4][1].transformer_blocks[0].attn2.to_k.in_features
        return model.input_blocks[0][0].in_channels, context
    except (AttributeError, IndexError):
        return 0, 0


def transformer(unet: Any, block: tuple[str, int]) -> nn.Module:
    """The host's transformer block: SD1.5 has one for each position, after the ResNet."""
    name, index = block
    model = unet.model.diffusion_model
    stage = model.middle_block if name == "middle" else getattr(model, f"{name}_blocks")[index]
    return stage[1].transformer_blocks[0]
