"""A model of one convolution that the engine runs on: what a new host must do, and no more."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib_layerdiffuse.engine.backend import BaseModel
from lib_layerdiffuse.engine.runner import Sampling
from lib_layerdiffuse.injection.content import Injection, WeightPatch, misfit
from lib_layerdiffuse.injection.patches import FIRST_BLOCK, Switch, condition_patch
from lib_layerdiffuse.methods import Family
from lib_layerdiffuse.tensors import Latent, Rgb

SCALE = 2.0  # from VAE space to sampler space


class SmallModel:
    """An SDXL model as far as anybody can tell. Noise levels go from 1 down to 0, a picture's seed is its noise."""

    samplers = ("Euler a", "Euler")
    usual_size = 64

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.unet = nn.ModuleDict({"input_blocks": nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))])})
        self.prompts: list[str] = []  # of all pictures so far
        self._switches: list[Switch] = []
        self._added: list[Callable[[Tensor], Tensor]] = []
        self._held: list[tuple[Latent, Latent, Callable[[float], Tensor]]] = []

    def base_model(self) -> BaseModel:
        return BaseModel("small", "an SDXL checkpoint", Family.SDXL)

    def posterior(self, rgb: Rgb) -> tuple[Latent, Latent]:
        mean = F.avg_pool2d(torch.cat([rgb, rgb.mean(1, keepdim=True)], dim=1), 8)
        return mean, mean / 100

    def pixels(self, vae_latent: Latent) -> Rgb:
        return F.interpolate(vae_latent[:, :3], scale_factor=8).clamp(0, 1)

    def sampler_latent(self, vae_latent: Latent) -> Latent:
        return vae_latent * SCALE

    def vae_latent(self, sampler_latent: Latent) -> Latent:
        return sampler_latent / SCALE

    @contextmanager
    def inject(
        self, injection: Injection, weight: float, start: float, stop: float, condition: Tensor | None
    ) -> Iterator[None]:
        patch = injection.content
        assert isinstance(patch, WeightPatch)
        own = {f"diffusion_model.{name}": parameter for name, parameter in self.unet.named_parameters()}
        if reason := patch.misfit(own):
            raise misfit(injection.method, reason)
        plain = {key: own[key].data for key in patch.diff}

        def turn(on: bool) -> None:
            for key, was in plain.items():
                own[key].data = was + on * weight * patch.diff[key]

        switch = Switch(1 - start, 1 - stop, turn, on=False)
        self._switches.append(switch)
        if patch.condition is not None and condition is not None:
            add = condition_patch(patch.condition, condition, weight, switch).call
            self._added.append(lambda h: add(h, {"block": FIRST_BLOCK}))
        try:
            yield
        finally:
            turn(False)
            self._switches.clear()
            self._added.clear()

    @contextmanager
    def hold(self, original: Latent, noise: Latent, released: Callable[[float], Tensor]) -> Iterator[None]:
        self._held.append((original, noise, released))
        yield
        self._held.clear()

    def places(self, module: nn.Module, memory: int) -> Iterator[torch.device]:
        yield torch.device("cpu")

    def forget(self, injection: Injection) -> None:
        """Nothing of it is kept."""

    @torch.no_grad()
    def sample(self, sampling: Sampling, start: Latent | None = None) -> Latent:
        self.prompts += sampling.prompts
        x = noise_of(sampling)
        levels = torch.linspace(1 if start is None else sampling.strength, 0, sampling.steps + 1).tolist()
        if start is not None:
            x = start + levels[0] * (x - start)
        for sigma, following in pairwise(levels):
            denoised = self._denoised(x, sigma)
            x = denoised + (x - denoised) * (following / sigma)
        return x

    def _denoised(self, x: Latent, sigma: float) -> Latent:
        for switch in self._switches:
            switch.at(sigma)
        for original, noise, released in self._held:
            x = torch.where(released(sigma), x, original + sigma * (noise - original))
        h = self.unet["input_blocks"][0](x)
        for add in self._added:
            h = add(h)
        for original, _, released in self._held:
            h = torch.where(released(sigma), h, original)
        return h


def noise_of(sampling: Sampling) -> Latent:
    shape = (4, sampling.height // 8, sampling.width // 8)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in sampling.seeds])
