"""Transparency in and out of latents, on whatever device the networks are."""

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib_layerdiffuse.cpu import FastDecoder
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.rgba import padded_argb
from lib_layerdiffuse.nets.decoder import TransparentDecoder
from lib_layerdiffuse.tensors import Latent, Rgb, Rgba

LATENT_STRIDE = 8  # pixels per latent cell, in each direction
DECODER_STRIDE = 64  # the decoder halves its input six times
OFFSET_SCALE = 300.0  # raw encoder output -> offset in the latent (`alpha=300` in the author's diffusers tool)

DECODE_CHANNELS = 600  # one pass over a picture takes the memory of so many channels of its size
BATCH_PIXELS = 2**20  # a GPU is busy with so many at once; more only take more memory

VAE_FLAGS, ALL_FLAGS = "--vae-in-fp32", "--all-in-fp32"  # Forge's, by which numbers do not overflow

Network: TypeAlias = Callable[..., Tensor]

OUT_OF_MEMORY = torch.cuda.OutOfMemoryError
OUT_OF_MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "not enough GPU video memory",
    "Invalid buffer size",
    "ALLOC_FAILED",
)


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


def in_groups(orientations: Sequence[Orientation], square: bool, size: int) -> Iterator[Sequence[Orientation]]:
    """At most `size` each, of one shape: where pictures are not square, upright and sideways ones by themselves."""
    for alike in [orientations] if square else [orientations[::2], orientations[1::2]]:
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


class InParts:
    """A network over a batch: all at once, and each time memory runs out half as many pictures at a time.

    smaller: another form of the network, slower and with less need of memory, for when not even one picture fits.
    """

    def __init__(self, net: Network, at_once: int, smaller: Network | None = None) -> None:
        self.net = net
        self.at_once = at_once
        self.smaller = smaller

    def __call__(self, *batches: Tensor) -> Tensor:
        self.at_once = min(self.at_once, len(batches[0]))
        while True:
            try:
                answers = [self.net(*part) for part in zip(*(batch.split(self.at_once) for batch in batches))]
                return torch.cat(answers) if len(answers) > 1 else answers[0]
            except RuntimeError as error:
                if (self.at_once == 1 and not self.smaller) or not is_out_of_memory(error):
                    raise
            # And again, outside the handler: the traceback holds tensors.
            if self.at_once == 1 and self.smaller:
                self.net, self.smaller = self.smaller, None
            self.at_once = (self.at_once + 1) // 2


def is_out_of_memory(error: RuntimeError) -> bool:
    """Only CUDA's has a class of its own; the CPU's, MPS's, DirectML's and the libraries' are known by their words."""
    return isinstance(error, OUT_OF_MEMORY) or any(words in str(error) for words in OUT_OF_MEMORY_WORDS)


def free_memory(device: torch.device) -> int:
    """Bytes that a new tensor could have there; more than any machine has where torch cannot tell."""
    if device.type != "cuda":
        return sys.maxsize
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def pictures_at_once(pixels: Tensor, weight: Tensor) -> int:
    """How many pictures of this size the whole network should see at a time, memory permitting."""
    area = pixels.shape[2] * pixels.shape[3]
    fitting = free_memory(weight.device) // (DECODE_CHANNELS * area * weight.element_size())
    return max(1, min(BATCH_PIXELS // area, fitting))


def on_processor(net: TransparentDecoder) -> Network:
    """The network with a copy of its weights in main memory, which is made at the first call."""
    decoder = cache(lambda: FastDecoder(net))
    return lambda *batches: decoder()(*(batch.cpu() for batch in batches))


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


def check_finite(values: Tensor, what: str, flags: str) -> None:
    """Raises LayerDiffuseError where some are no numbers, or infinite: they would make a picture of nothing."""
    if not values.isfinite().all():
        raise LayerDiffuseError(
            f"{what} has values that are no numbers, or are infinite, as when half precision overflows. Start the web "
            f"UI with {flags} (without one: --device cpu). If that changes nothing, the weights behind it are damaged."
        )


def check_painted(rgb: Rgb, latent: Latent) -> None:
    """Raises LayerDiffuseError where a picture and its latent are of no use."""
    check_finite(latent, "The latent", f"--unet-in-bf16 or {ALL_FLAGS}")
    check_finite(rgb, "The picture that the VAE made", VAE_FLAGS)


def check_encoded(mean: Latent) -> None:
    """The same for what the VAE made of a picture."""
    check_finite(mean, "The latent that the VAE made", VAE_FLAGS)


def median(answers: Tensor) -> Rgba:
    """Of each value of Argb, [passes, B, 4, H, W], the lower one where there are two; takes the answers' memory."""
    alpha, color = lower_median(answers).split([1, 3], dim=1)
    return torch.cat([color, alpha], dim=1)


def lower_median(answers: Tensor) -> Tensor:
    """`answers.median(dim=0).values`, by sorting in place: no indices, and smaller and larger ones of whole pictures.

    Passes that nobody stopped are 1, 2, 4 or 8, for which Batcher's network (1968) has the comparisons.
    """
    count = len(answers)
    if count not in PASSES:
        return answers.median(dim=0).values
    values, spare = list(answers), torch.empty_like(answers[0])
    for a, b in comparisons(count):
        torch.minimum(values[a], values[b], out=spare)
        torch.maximum(values[a], values[b], out=values[b])
        values[a], spare = spare, values[a]
    return values[(count - 1) // 2]


def comparisons(count: int) -> Iterator[tuple[int, int]]:
    """Batcher's merge exchange (Knuth, volume 3, algorithm 5.2.2M), for a power of two: 19 pairs sort eight values."""
    for p in (count >> shift for shift in range(1, count.bit_length())):
        q, rest, distance = count // 2, 0, p
        while distance > 0:
            yield from ((i, i + distance) for i in range(count - distance) if i & p == rest)
            distance, q, rest = (q - p, q // 2, p) if q != p else (0, q, rest)


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
        check_painted(rgb, latent)
        rgba = median(self._answers(rgb, latent, ORIENTATIONS[:passes], on_pass))
        check_finite(rgba, "The answer of the transparent decoder", ALL_FLAGS)
        return rgba.clamp_(0, 1).to(rgb.device)

    def _answers(
        self,
        rgb: Rgb,
        latent: Latent,
        orientations: Sequence[Orientation],
        on_pass: Callable[[int, int], bool] | None,
    ) -> Tensor:
        """Argb of each pass. The network's maps go with this call, before the median takes as much as all answers."""
        batch, _, height, width = rgb.shape
        weight = next(self.decoder.parameters(), rgb)
        pixels = pad_to_multiple(rgb.float(), DECODER_STRIDE).to(weight.device)
        cells = pad_to_multiple(latent.float(), DECODER_STRIDE // LATENT_STRIDE).to(weight.device)
        network = self._network(pixels, weight)

        answers = torch.empty(len(orientations), batch, 4, height, width, device=weight.device)
        done = 0
        for group in in_groups(orientations, height == width, max(1, network.at_once // batch)):
            raw = network(*(torch.cat([each.apply(x) for each in group]) for x in (pixels, cells)))
            for orientation, answer in zip(group, raw.chunk(len(group))):
                answers[done].copy_(orientation.undo(answer)[..., :height, :width])
                done += 1
                if on_pass is not None and not on_pass(done, len(orientations)):
                    return answers[:done]
            del raw, answer  # before the next pass needs its memory
        return answers

    def _network(self, pixels: Tensor, weight: Tensor) -> InParts:
        """The decoder in the form that suits its device; elsewhere than on a processor, there too if it must."""
        if not isinstance(self.decoder, TransparentDecoder):
            return InParts(self.decoder, pictures_at_once(pixels, weight))
        if weight.device.type == "cpu":
            return InParts(FastDecoder(self.decoder), 1)
        return InParts(self.decoder, pictures_at_once(pixels, weight), smaller=on_processor(self.decoder))

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
        argb = padded_argb(rgba)
        offset = InParts(self.encoder, len(rgba))(argb.to(next(self.encoder.parameters(), rgba)))
        check_finite(offset, "The answer of the transparent encoder", ALL_FLAGS)
        return offset.float().to(rgba.device) * OFFSET_SCALE
