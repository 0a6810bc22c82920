"""Transparency in and out of latents, on whatever device the networks are."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images import pad_colors
from lib_layerdiffuse.tensors import Latent, Rgb, Rgba

LATENT_STRIDE = 8  # pixels per latent cell, in each direction
DECODER_STRIDE = 64  # the decoder halves its input six times
OFFSET_SCALE = 300.0  # raw encoder output -> offset in the latent (`alpha=300` in the author's diffusers tool)

OUT_OF_MEMORY = torch.cuda.OutOfMemoryError
OUT_OF_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")


class Orientation(NamedTuple):
    """One of the eight ways to turn a picture."""

    flipped: bool
    quarter_turns: int

    def apply(self, picture: Tensor) -> Tensor:
        return (picture.flip(3) if self.flipped else picture).rot90(self.quarter_turns, (2, 3))

    def undo(self, picture: Tensor) -> Tensor:
        picture = picture.rot90(-self.quarter_turns, (2, 3))
        return picture.flip(3) if self.flipped else picture


ORIENTATIONS = tuple(Orientation(flipped, turns) for flipped in (False, True) for turns in range(4))
PASSES = (1, 2, 4, 8)  # how many of them a decode may use, from the first on


class InParts:
    """A network over a batch: all at once, and each time memory runs out half as many pictures at a time."""

    def __init__(self, net: nn.Module, at_once: int) -> None:
        self.net = net
        self.at_once = at_once

    def __call__(self, *batches: Tensor) -> Tensor:
        while True:
            try:
                return torch.cat([self.net(*part) for part in zip(*(batch.split(self.at_once) for batch in batches))])
            except RuntimeError as error:
                if self.at_once == 1 or not is_out_of_memory(error):
                    raise
            self.at_once = (self.at_once + 1) // 2  # and again, outside the handler: the traceback holds tensors


def is_out_of_memory(error: RuntimeError) -> bool:
    """Only CUDA's has a class of its own; the CPU's, MPS's and the libraries' are known by their words."""
    return isinstance(error, OUT_OF_MEMORY) or any(words in str(error) for words in OUT_OF_MEMORY_WORDS)


def check_sizes(rgb: Rgb, latent: Latent) -> None:
    batch, _, height, width = rgb.shape
    expected = (batch, height / LATENT_STRIDE, width / LATENT_STRIDE)
    found = (latent.shape[0], *latent.shape[2:])
    if found != expected:
        raise LayerDiffuseError(
            f"Pictures and latents do not belong together: {batch} of {width}×{height} pixels, and "
            f"{found[0]} of {found[2]}×{found[1]}, which is not {width}/{LATENT_STRIDE}×{height}/{LATENT_STRIDE}. "
            "Switch off what resizes the picture before it gets its transparency."
        )


def pad_to_multiple(picture: Tensor, multiple: int) -> Tensor:
    """Right and bottom edges repeated: [B, C, H, W] -> the next sizes that `multiple` divides."""
    height, width = picture.shape[2:]
    return F.pad(picture, (0, -width % multiple, 0, -height % multiple), mode="replicate")


class TransparentVAE:
    """The two networks with all that is around them; runs where the networks are, answers where the input was."""

    def __init__(self, decoder: nn.Module, encoder: nn.Module | None = None) -> None:
        self.decoder = decoder
        self.encoder = encoder

    @torch.no_grad()
    def decode(
        self, rgb: Rgb, latent: Latent, passes: int = 8, on_pass: Callable[[int, int], bool] | None = None
    ) -> Rgba:
        """The VAE's picture and the latent it came from -> the picture with its transparency, float32.

        The network looks at the picture in `passes` orientations; every value is the lower median of its answers.
        on_pass: hears (passes done, passes in all) after each one; False stops there.
        """
        if passes not in PASSES:
            raise ValueError(f"passes is {passes}, expected one of {PASSES}")
        check_sizes(rgb, latent)
        height, width = rgb.shape[2:]
        network = InParts(self.decoder, len(rgb))
        weight = next(self.decoder.parameters(), rgb)
        pixels = pad_to_multiple(rgb.float(), DECODER_STRIDE).to(weight)
        cells = pad_to_multiple(latent.float(), DECODER_STRIDE // LATENT_STRIDE).to(weight)

        answers: list[Tensor] = []
        for orientation in ORIENTATIONS[:passes]:
            raw = network(orientation.apply(pixels), orientation.apply(cells))
            answers.append(orientation.undo(raw)[..., :height, :width].float().clamp(0, 1))
            if on_pass is not None and not on_pass(len(answers), passes):
                break
        alpha, color = torch.stack(answers).median(dim=0).values.split([1, 3], dim=1)
        return torch.cat([color, alpha], dim=1).to(rgb.device)

    @torch.no_grad()
    def encode(self, rgba: Rgba) -> Latent:
        """What to add to the latent of the picture over grey 0.5, times the posterior's deviation, float32."""
        height, width = rgba.shape[2:]
        if height % LATENT_STRIDE or width % LATENT_STRIDE:
            raise LayerDiffuseError(
                f"The picture has {width}×{height} pixels. Choose a width and height that {LATENT_STRIDE} divides."
            )
        if self.encoder is None:
            raise LayerDiffuseError("The picture's transparency cannot be encoded: the transparent encoder is missing.")
        argb = torch.cat([rgba[:, 3:].float(), pad_colors(rgba)], dim=1)
        offset = InParts(self.encoder, len(rgba))(argb.to(next(self.encoder.parameters(), rgba)))
        return offset.float().to(rgba.device) * OFFSET_SCALE
