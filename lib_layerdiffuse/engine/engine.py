"""What is done with a loaded model for a picture with transparency: each step once, for all faces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

from lib_layerdiffuse.engine.backend import Backend, BaseModel
from lib_layerdiffuse.engine.loaded import LoadedWeights
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.rgba import GREY, compose
from lib_layerdiffuse.injection.content import Injection, WeightPatch
from lib_layerdiffuse.methods import Layer, Method, Step, find_method
from lib_layerdiffuse.request.layers import Request
from lib_layerdiffuse.tensors import Latent, Rgb, Rgba
from lib_layerdiffuse.vae import DECODE_CHANNELS, TransparentVAE, check_encoded, is_out_of_memory

OnPass: TypeAlias = Callable[[int, int], bool]  # passes done, passes in all; False ends decoding

# What the encoder keeps alive at its peak: about this many channels of the picture's size (a generous estimate, by
# which the host makes room beforehand).
ENCODE_CHANNELS = 100


class Engine:
    """A loaded model with the weights of the methods. Every method raises LayerDiffuseError, with a sentence."""

    def __init__(self, backend: Backend, weights: LoadedWeights) -> None:
        self.backend = backend
        self.weights = weights

    def injection(self, request: Request) -> Injection | None:
        """What goes into the UNet for the request; None where nothing does."""
        return self.weights.injection(request.method) if request.injects else None

    def posterior(self, rgb: Rgb) -> tuple[Latent, Latent]:
        """Mean and std of the pictures' latents, in VAE space: numbers."""
        mean, std = self.backend.posterior(rgb)
        check_encoded(mean)
        return mean, std

    def encode(self, vae: TransparentVAE, rgba: Rgba) -> tuple[Latent, Latent]:
        """The latents of the picture over grey, and of the picture with its transparency, in VAE space."""
        encoder = vae.encoder
        assert encoder is not None, "a start without an encoder"
        mean, std = self.posterior(compose(rgba, GREY))
        offset = self.with_room(encoder, ENCODE_CHANNELS, rgba, lambda: vae.encode(rgba))
        return mean, mean + std * offset.to(mean)

    def start(self, encoded: Sequence[Sequence[Latent]], layers: Sequence[Layer | None], frames: int) -> Latent:
        """What rows of img2img start from, in sampler space: transparency goes into those of foregrounds only.

        encoded: of each picture, as `encode` answers (the first alone, where there is no foreground); the rows take
        them in turn, `frames` rows each.
        """
        rows = enumerate(layers)
        latents = [encoded[row // frames % len(encoded)][layer is Layer.FG] for row, layer in rows]
        return self.backend.sampler_latent(torch.cat(latents))

    def condition(self, injection: Injection, pictures: Sequence[Rgb]) -> Tensor:
        """What the injection reads of the pictures, each [b, 3, H, W]: one for all rows, or one for each.

        Weight patches read latents in sampler space, one after the other in channels; attention sharing the picture.
        """
        if not isinstance(injection.content, WeightPatch):
            [picture] = pictures
            return picture
        rows = max(map(len, pictures))
        means = [self.posterior(picture)[0].expand(rows, -1, -1, -1) for picture in pictures]
        return self.backend.sampler_latent(torch.cat(means, dim=1))

    def inject(
        self, request: Request, injection: Injection | None, condition: Callable[[], Tensor | None]
    ) -> AbstractContextManager[None]:
        """While open, sampling runs with the injection as the request says; see `Backend.inject`.

        condition: what `condition` answers, made when all else fits.
        """
        check_family(request.method, self.backend.base_model())
        if injection is None:
            return nullcontext()
        return self.backend.inject(injection, request.weight, request.starting_step, request.ending_step, condition())

    def decode(self, vae: TransparentVAE, rgb: Rgb, latent: Latent, passes: int, on_pass: OnPass | None = None) -> Rgba:
        """`TransparentVAE.decode`, wherever there is room for it. latent: in VAE space."""
        return self.with_room(vae.decoder, DECODE_CHANNELS, rgb, lambda: vae.decode(rgb, latent, passes, on_pass))

    def with_room(self, net: nn.Module, channels: int, picture: Tensor, work: Callable[[], Tensor]) -> Tensor:
        """Work that needs `net` and, for a picture, the memory of so many channels, on whatever device has room."""
        height, width = picture.shape[-2:]
        memory = channels * height * width * next(net.parameters()).element_size()
        for device in self.backend.places(net, memory):
            try:
                net.to(device)  # all of it: short of memory, hosts leave layers behind
                return work()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
        raise LayerDiffuseError(f"Not enough memory for a picture of {width}x{height}. Choose a smaller size.")


def check_family(method: Method, model: BaseModel) -> None:
    """Raises LayerDiffuseError where the method is for models of another family."""
    if model.family is not method.family:
        raise LayerDiffuseError(
            f"{method.full_title} needs a plain {method.family.word} checkpoint, but {model.checkpoint} is "
            f"{model.kind}. Choose another checkpoint, or a method for this one."
        )


def words_before(request: Request) -> list[str]:
    """What is put before the prompt of each picture that belongs together; empty where nothing is."""
    return [request.words_before(layer) for layer in request.method.outputs]


def run_chain(request: Request, run: Callable[[Request, Step], Sequence[Image.Image] | None]) -> None:
    """Run the steps of a chain, each with the pictures of those before it.

    run: makes the pictures of one step; None where the user wants it to end.
    """
    images = dict(request.images)
    for step in request.method.chain:
        made = run(request.for_step(step, images), step)
        if made is None:
            return
        [layer] = find_method(step.key).outputs
        images[layer] = made
