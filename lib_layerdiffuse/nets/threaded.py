"""The decoder in strips on a processor, with compiled kernels and a strip for each thread."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from lib_layerdiffuse.nets import compiled, strips, winograd
from lib_layerdiffuse.nets.attention import compiled_attention
from lib_layerdiffuse.nets.decoder import HEAD_DIM, TransparentDecoder
from lib_layerdiffuse.nets.products import linear
from lib_layerdiffuse.nets.strips import (
    FeatureMap,
    Layer,
    Normalising,
    Rows,
    Strip,
    StripDecoder,
    joined,
    normalisation,
    spans,
)
from lib_layerdiffuse.nets.threads import Threads
from lib_layerdiffuse.tensors import Argb, Latent, Rgb

STRIP_BYTES = 4 * 2**20  # of a layer's input or output, for each thread
SHARES = 2  # of a layer, at least, for each thread: none waits for long for another
WORTH_TILES = 32  # channels; where the kernels turn the tiles, Winograd's way pays sooner
TILE_NUMBERS = 16384  # of each point at once: few enough for the caches, enough to be worth a call


class ThreadedDecoder(StripDecoder):
    """Answers as `net` does, whose weights are on a processor."""

    def __init__(self, net: TransparentDecoder) -> None:
        halves = net.conv_in.weight.dtype == torch.bfloat16
        super().__init__(net, precision=torch.bfloat16 if halves else torch.float32)
        self._threads = Threads()

    def __call__(self, rgb: Rgb, latent: Latent) -> Argb:
        """One picture after another."""
        answer = super().__call__
        answers = self._threads.lead(lambda: [answer(*picture) for picture in zip(rgb.split(1), latent.split(1))])
        return torch.cat(answers) if len(answers) > 1 else answers[0]

    # --- layers ---

    def _convolved(
        self, sources: Sequence[FeatureMap], normalising: Normalising | None, weights: Tensor, bias: Tensor, stride: int
    ) -> Rows:
        _, _, height, width = sources[0].values.shape
        suits_tiles = min(weights.shape[:2]) >= WORTH_TILES and height * width >= strips.WORTH_KERNEL
        in_vectors = self._suit_vectors(len(weights), *(source.values.shape[1] for source in sources))
        if normalising and stride == 1 and weights.dtype == torch.float32 and suits_tiles and in_vectors:
            return self._in_tiles(sources, normalising, weights, bias)
        return super()._convolved(sources, normalising, weights, bias, stride)

    def _in_tiles(self, sources: Sequence[FeatureMap], normalising: Normalising, weights: Tensor, bias: Tensor) -> Rows:
        """Winograd's convolution; of joined sources, the products of each are added up."""
        width_out, width = len(weights), sources[0].values.shape[3]
        widths_in = [source.values.shape[1] for source in sources]
        parts = in_arrays(sources, normalising)
        kernels = [self._turned(each, index) for index, each in enumerate(weights.split(widths_in, dim=1))]
        tiles = TILE_NUMBERS // max(width_out, *widths_in)

        def strip(top: int, bottom: int) -> Tensor:
            y = self._scratch("answer", bottom - top, width, width_out)
            target = y.numpy()
            down, across = -(-(bottom - top) // winograd.TILE), -(-width // winograd.TILE)
            for first in range(0, across, max(1, tiles // down)):
                count = min(max(1, tiles // down), across - first)
                products = self._scratch("products", winograd.POINTS, down * count, width_out)
                for index, kernel in enumerate(kernels):
                    factors = self._scratch("factors", winograd.POINTS, down * count, widths_in[index])
                    flat = factors.flatten(1).numpy()
                    compiled.into_tiles(*parts[index], top, first, down, count, flat)
                    torch.baddbmm(products, factors, kernel, beta=min(index, 1), out=products)
                compiled.out_of_tiles(products.flatten(1).numpy(), bias.numpy(), first, count, target)
            return y.permute(2, 0, 1)[None]

        return strip

    def _reader(self, sources: Sequence[FeatureMap], normalising: Normalising | None = None) -> Rows:
        widths = [source.values.shape[1] for source in sources]
        if not normalising or not self._suit_vectors(*widths):
            return super()._reader(sources, normalising)
        parts, offsets = in_arrays(sources, normalising), list(accumulate(widths, initial=0))
        columns = sources[0].values.shape[3] + 2

        def read(top: int, bottom: int) -> Tensor:
            x = self._scratch("strip", bottom - top, columns, offsets[-1])
            target = numbers(x)
            for part, offset in zip(parts, offsets):
                compiled.activate(*part, top, offset, target)
            return x.permute(2, 0, 1)[None]

        return read

    def _turned(self, weights: Tensor, index: int = 0) -> Tensor:
        """`winograd.turned` in threads."""
        shape = len(weights), winograd.POINTS, weights.shape[1]
        kernel = self._scratch(f"kernel {index}", *shape, dtype=torch.float32)
        self._threads.run(partial(winograd.turn, weights[part], kernel[part]) for part in self._parts(len(weights)))
        return kernel.permute(1, 2, 0)

    def _attend(self, source: FeatureMap, attention: Any) -> FeatureMap:
        """Each thread has some heads, then some rows."""
        if isinstance(attention, nn.Identity):
            return source
        [(scale, shift)] = normalisation([source], attention.group_norm)
        _, channels, height, width = source.values.shape
        rows = source.values.permute(0, 2, 3, 1).flatten(0, 2)  # -> [HW, C]
        floats = partial(self._scratch, dtype=torch.float32)
        tokens = torch.addcmul(shift.flatten(), rows, scale.flatten(), out=floats("tokens", *rows.shape))
        tokens, mixed = tokens.to(self.precision), floats("mixed", channels, height * width)

        def projected(layer: Any, part: slice) -> Tensor:
            weights, bias = layer.weight[part].to(self.precision), layer.bias[part]
            return linear(weights, tokens).float().add_(bias[:, None]).unflatten(0, (-1, HEAD_DIM))

        def heads(part: slice) -> None:
            q, k, v = (projected(layer, part) for layer in (attention.to_q, attention.to_k, attention.to_v))
            compiled_attention(q, k, v, mixed[part].view_as(q), compiled.attend)

        self._threads.run(partial(heads, part) for part in self._parts(channels, HEAD_DIM))
        weights, bias = (each.to(self.precision) for each in (attention.to_out[0].weight, attention.to_out[0].bias))

        def strip(top: int, bottom: int) -> tuple[Tensor, Tensor]:
            y = linear(mixed[:, top * width : bottom * width].T.to(self.precision), weights, bias)
            return y.view(1, bottom - top, width, channels).permute(0, 3, 1, 2), source.values[:, :, top:bottom]

        answer = self._by_strips(self._take(source.values.shape), lambda _: strip)
        self._give_back(source)
        return answer

    # --- strips ---

    def _by_strips(self, values: Tensor, layer: Layer, widest: int = 1, weights: int = 0) -> FeatureMap:
        """The threads share the rows, or where there are more weights than pixels, the channels."""
        _, channels, height, _ = values.shape
        by_channels = shared_by_channels(weights, values)
        rows = [(0, height)] if by_channels else spans(values, widest, STRIP_BYTES, SHARES * self._threads.count)
        moments = torch.empty(len(rows), 2, 1, channels, dtype=torch.float64)
        target, found = in_memory(values), moments[:, :, 0].numpy()

        def settle(strip: Strip, index: int, part: slice = slice(0, channels)) -> None:
            top, bottom = rows[index]
            y, beside = strip(top, bottom)
            if self._suit_vectors(y.shape[1]):
                more = in_memory(y[:, :, :0] if beside is None else beside)
                compiled.settle(in_memory(y), more, target[top:bottom], part.start, found[index])
            else:
                moments[index, ..., part] = strips.settle(y, beside, values[:, part, top:bottom])

        def share(part: slice) -> None:
            settle(layer(part), 0, part)

        if by_channels:
            works = [partial(share, part) for part in self._parts(channels, compiled.LANES)]
        else:
            strip = layer(slice(0, channels))
            works = [partial(settle, strip, index) for index in range(len(rows))]
        self._threads.run(works, after=self._scratch.give_back)
        self._scratch.give_back()
        return joined(values, rows, moments)

    def _in_place(self, conv: nn.Conv2d, source: FeatureMap) -> bool:
        return not shared_by_channels(conv.weight.numel(), source.values)

    def _suit_vectors(self, *widths: int) -> bool:
        """Whether the kernels take maps of so many channels; others, and those of float16, are left to torch."""
        return self.net.conv_in.weight.dtype == self.precision and not any(width % compiled.LANES for width in widths)

    def _parts(self, channels: int, step: int = 1) -> list[slice]:
        """SHARES of the channels for each thread, `step` or a multiple each."""
        size = -(-channels // (step * SHARES * self._threads.count)) * step
        return [slice(first, min(first + size, channels)) for first in range(0, channels, size)]


def shared_by_channels(weights: int, values: Tensor) -> bool:
    """Whether the threads share a map's channels: each weight is then turned and read by one of them alone."""
    return weights > values.numel()


def in_arrays(sources: Sequence[FeatureMap], normalising: Normalising) -> list[tuple[Any, Any, Any]]:
    """What the kernels take of each source: its rows, their scale and shift."""
    return [
        (in_memory(source.values), scale.flatten().numpy(), shift.flatten().numpy())
        for source, (scale, shift) in zip(sources, normalising)
    ]


def in_memory(values: Tensor) -> Any:
    """[1, C, H, W], channels last -> NumPy's view, [H, W, C]."""
    return numbers(values[0].permute(1, 2, 0))


def numbers(values: Tensor) -> Any:
    """NumPy's view: float32, or the bits of bfloat16."""
    return (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()
