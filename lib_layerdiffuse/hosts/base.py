"""What the extension asks of a web UI. `p` is the host's own object for one job (`StableDiffusionProcessing`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import nn

from lib_layerdiffuse.injection import Injection
from lib_layerdiffuse.methods import Family
from lib_layerdiffuse.tensors import Latent


@dataclass(frozen=True)
class BaseModel:
    """The loaded checkpoint. `family` is None where LayerDiffuse has no weights for it; `kind` says what it is."""

    checkpoint: str
    kind: str
    family: Family | None


class Host(Protocol):
    """One web UI. Every host imports its web UI in its own file only."""

    def weight_folders(self) -> list[Path]:
        """Where weight files are looked for; the first is where they are downloaded to."""

    def option(self, key: str) -> Any:
        """A value of the host's settings page."""

    def progress(self) -> AbstractContextManager[Callable[[str, float], None]]:
        """While open, the yielded `report(text, fraction)` shows both on the host's progress bar."""

    def interrupted(self) -> bool:
        """Whether the user wants this picture to end now."""

    def fail(self, p: Any, error: Exception) -> None:
        """Make the job end with `error` at its next step: hosts swallow what a hook raises."""

    def base_model(self, p: Any) -> BaseModel:
        """The checkpoint that this job samples with."""

    def init_images(self, p: Any) -> list[Image.Image]:
        """The pictures that img2img starts from; empty in txt2img."""

    def set_init_images(self, p: Any, init_images: list[Image.Image]) -> None:
        """Have img2img start from these instead."""

    def flatten_upscaled(self, p: Any, flatten: Callable[[Image.Image], Image.Image]) -> None:
        """The upscale button under the gallery starts from a finished picture, which hosts take for RGB."""

    def has_mask(self, p: Any) -> bool:
        """Whether this is inpainting."""

    def around_sampling(
        self, p: Any, injected: Callable[[], AbstractContextManager[None]], finished: Callable[[Latent], None]
    ) -> None:
        """Run the next sampling inside `injected()` and hand its final latent, in sampler space, to `finished`."""

    def inject(self, p: Any, injection: Injection, weight: float, ending_step: float) -> AbstractContextManager[None]:
        """While open, sampling runs with `injection`; above `ending_step` (0..1 of the schedule) without.

        Raises LayerDiffuseError where the weights do not fit the UNet.
        """

    def vae_latent(self, p: Any, sampler_latent: Latent) -> Latent:
        """From sampler space to VAE space (unscaled)."""

    def places(self, module: nn.Module, memory: int) -> Iterator[torch.device]:
        """Devices to run `module` on, each roomier and slower than the last; makes room for `memory` bytes there."""

    def show(self, p: Any, processed: Any, extras: Sequence[Image.Image]) -> None:
        """Put the extras behind what the job made (`processed`), where, for the API, the pictures precede the grid."""

    def save_beside(self, p: Any, image: Image.Image, path: Path, suffix: str, extension: str, infotext: str) -> None:
        """Save `image` in `path`'s folder, under its name with `suffix`."""
