"""What the engine asks of the program that loaded a model: the only thing that each of them does in its own way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lib_layerdiffuse.injection.content import Injection
from lib_layerdiffuse.methods import Family
from lib_layerdiffuse.tensors import Latent, Rgb


@dataclass(frozen=True)
class BaseModel:
    """A checkpoint. `family` is None where LayerDiffuse has no weights for it; `kind` says what it is."""

    checkpoint: str
    kind: str
    family: Family | None


class Backend(Protocol):
    """A loaded model. Only the file of a backend imports the program that it belongs to."""

    def base_model(self) -> BaseModel:
        """The checkpoint that is loaded now."""

    def posterior(self, rgb: Rgb) -> tuple[Latent, Latent]:
        """Mean and std of the VAE's posterior for the pictures, in VAE space: the same each time."""

    def sampler_latent(self, vae_latent: Latent) -> Latent:
        """From VAE space (unscaled) to sampler space."""

    def vae_latent(self, sampler_latent: Latent) -> Latent:
        """From sampler space to VAE space (unscaled)."""

    def inject(
        self, injection: Injection, weight: float, start: float, stop: float, condition: Tensor | None
    ) -> AbstractContextManager[None]:
        """While open, sampling runs with `injection` at this weight, between these fractions of the steps.

        condition: of one picture for all or of each, at the size of the sampling: latents in sampler space, one after
        the other in channels, for weight patches; the picture itself (Rgb) for attention sharing.
        Raises LayerDiffuseError where the weights do not fit the UNet.
        """

    def hold(
        self, original: Latent, noise: Latent, released: Callable[[float], Tensor]
    ) -> AbstractContextManager[None]:
        """While open, what is not released at a noise level is kept at the original, with this noise.

        original, noise: in sampler space. released(sigma): where the UNet is called; bool [B, 1, H/8, W/8].
        """

    def places(self, module: nn.Module, memory: int) -> Iterator[torch.device]:
        """Devices to run `module` on, each roomier and slower than the last; makes room for `memory` bytes there."""

    def forget(self, injection: Injection) -> None:
        """Let go of what was loaded of it: it is not used any more."""
