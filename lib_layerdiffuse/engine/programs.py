"""Programs whose loaded models can be patched, and what each calls the parts that are used of it.

All descend from ComfyUI's patcher. What differs is found by looking for it, never by a version: they change weekly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.tensors import Latent

# Of each kind: the modules of its memory management, its patcher and its LoRAs.
PACKAGES = (
    ("backend.memory_management", "backend.patcher.base", "backend.patcher.lora"),  # Forge, Neo, ersatz
    ("ldm_patched.modules.model_management", "ldm_patched.modules.model_patcher", "ldm_patched.modules.lora"),
)


@dataclass(frozen=True)
class Program:
    """The parts of one program."""

    memory: ModuleType
    patcher: Callable[..., Any]  # ModelPatcher(module, load_device=, offload_device=)
    lora: Callable[..., Any]  # load_lora(tensors, {name: key})

    def load_lora(self, tensors: Mapping[str, Tensor], keys: Sequence[str]) -> dict[str, Any]:
        """The program's patches by key, of `<key>.lora_up.weight` and `<key>.lora_down.weight`."""
        answer = self.lora(tensors, {key: key for key in keys})
        return dict(answer[0] if isinstance(answer, tuple) else answer)  # some answer with what is left over too

    def dtype(self, device: torch.device) -> torch.dtype:
        """What the program computes in there."""
        if self.memory.should_use_fp16(device):
            return torch.float16
        usable = getattr(self.memory, "should_use_bf16", lambda device: False)  # Classic has none
        return torch.bfloat16 if usable(device) else torch.float32

    def forget(self, patcher: Any) -> None:
        """Take a patcher and its clones out of the memory management, without moving anything."""
        loaded = self.memory.current_loaded_models
        loaded[:] = [each for each in loaded if getattr(each.model, "model", None) is not patcher.model]


def running() -> Program:
    """The program that this process is. Raises LayerDiffuseError, saying what is missing, where it is none of these."""
    missing = []
    for memory, patcher, lora in PACKAGES:
        try:
            return Program(import_module(memory), import_module(patcher).ModelPatcher, import_module(lora).load_lora)
        except (ImportError, AttributeError) as error:
            missing.append(str(error))
    raise LayerDiffuseError(" and ".join(missing))


def schedule_of(model: Any) -> Any:
    """What knows the noise levels of a UNet's model."""
    return model.predictor if hasattr(model, "predictor") else model.model_sampling


def with_noise(schedule: Any, sigma: Tensor, noise: Tensor, latent: Latent) -> Latent:
    """A latent as it is at a noise level. Classic knows no other models than those that add noise to it."""
    if hasattr(schedule, "noise_scaling"):
        return schedule.noise_scaling(sigma, noise, latent)
    return latent + sigma * noise


def computation_dtype(model: Any) -> torch.dtype:
    """What a UNet's model computes in."""
    if hasattr(model, "computation_dtype"):
        return model.computation_dtype
    return model.manual_cast_dtype or model.get_dtype()
