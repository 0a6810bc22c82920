"""The decoder in strips on a processor, with compiled kernels and a strip for each thread."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lib_layerdiffuse.nets import compiled, strips, winograd
from lib_layerdiffuse.nets.attention import compiled_attention
from lib_layerdiffuse.nets.decoder import HEAD_DIM, TransparentDecoder
from lib_layerdiffuse.nets.products import linear
from lib_layerdiffuse.nets.strips import FeatureMap, Layer, Shape, Strip, StripDecoder, joined, normalisation, spans
from lib_layerdiffuse.nets.threads import Threads
from lib_layerdiffuse.tensors import Argb, Latent, Rgb

STRIP_BYTES = 2 * 2**20  # of a layer's input or output, for each thread
SHARES = 4  # of a layer, at least, for each thread: none waits for long for another
WORTH_TILES = 32  # channels; where the kernels turn the tiles, Winograd's way pays sooner
TILE_NUMBERS = 8192  # of each point at once: factors and products stay in a core's second cache, or nearly


class ThreadedDecoder(StripDecoder):
    """Answers as `net` does, whose weights are on a processor; the maps are float32."""

    def __init__(self, net: TransparentDecoder) -> None:
        super().__init__(net, precision=torch.float32)
        self._threads = Threads()

    def __call__(self, rgb: Rgb, latent: Latent) -> Argb:
        """One picture after another."""
        answer = super().__call__
        with self._threads.alone():
            answers = [answer(*picture) for picture in zip(rgb.split(1), latent.split(1))]
        return torch.cat(answers) if len(answers) > 1 else answers[0]

    # --- layers ---

    def _convolved(
        self,
        sources: Sequence[FeatureMap],
        normalising: Sequence[tuple[Tensor, Tensor]] | None,
        weights: Tensor,
        bias: Tensor,
        stride: int,
    ) -> Strip:
        _, _, height, width = sources[0].values.shape
        suits_tiles = min(weights.shape[:2]) >= WORTH_TILES and height * width >= strips.WORTH_KERNEL
        if normalising and stride == 1 and weights.dtype == torch.float32 and suits_tiles:
            return self._in_tiles(sources, normalising, weights, bias)
        return super()._convolved(sources, normalising, weights, bias, stride)

    def _in_tiles(
        self,
        sources: Sequence[FeatureMap],
        normalising: Sequence[tuple[Tensor, Tensor]],
        weights: Tensor,
        bias: Tensor,
    ) -> Strip:
        """Winograd's convolution; of joined sources, the products of each are added up."""
        width_out, width = len(weights), sources[0].values.shape[3]
        widths_in = [source.values.shape[1] for source in sources]
        rows = [in_memory(source.values) for source in sources]
        scales, shifts = ([each.flatten().numpy() for each in pair] for pair in zip(*normalising))
        kernels = [self._turned(each, f"kernel {index}") for index, each in enumerate(weights.split(widths_in, dim=1))]
        tiles = TILE_NUMBERS // max(width_out, *widths_in)

        def strip(top: int, bottom: int) -> Tensor:
            y = self._scratch("answer", bottom - top, width, width_out)
            down, across = -(-(bottom - top) // winograd.TILE), -(-width // winograd.TILE)
            for first in range(0, across, max(1, tiles // down)):
                count = min(max(1, tiles // down), across - first)
                products = self._scratch("products", winograd.POINTS, down * count, width_out)
                for index, kernel in enumerate(kernels):
                    factors = self._scratch("factors", winograd.POINTS, down * count, widths_in[index])
                    flat = factors.flatten(1).numpy()
                    compiled.into_tiles(rows[index], scales[index], shifts[index], top, first, down, count, flat)
                    torch.baddbmm(products, factors, kernel, beta=min(index, 1), out=products)
                compiled.out_of_tiles(products.flatten(1).numpy(), bias.numpy(), first, count, y.numpy())
            return y.permute(2, 0, 1)[None]

        return strip

    def _turned(self, weights: Tensor, name: str) -> Tensor:
        """`winograd.turned` in threads, and scratch memory of this name."""
        kernel = self._scratch(name, len(weights), winograd.POINTS, weights.shape[1])
        self._threads.run(partial(winograd.turn, weights[part], kernel[part]) for part in self._parts(len(weights)))
        return kernel.permute(1, 2, 0)

    def _attend(self, source: FeatureMap, attention: Any) -> FeatureMap:
        """Each thread has some heads, then some rows."""
        if isinstance(attention, nn.Identity):
            return source
        [(scale, shift)] = normalisation([source], attention.group_norm)
        batch, channels, height, width = source.values.shape
        rows = source.values.permute(0, 2, 3, 1).flatten(0, 2)  # -> [HW, C]
        tokens = torch.addcmul(shift.flatten(), rows, scale.flatten(), out=self._scratch("tokens", *rows.shape))
        mixed = self._scratch("mixed", channels, height * width)

        def projected(layer: Any, part: slice) -> Tensor:
            weights, bias = layer.weight[part].float(), layer.bias[part].float()
            return linear(weights, tokens).add_(bias[:, None]).unflatten(0, (-1, HEAD_DIM))

        def heads(part: slice) -> None:
            q, k, v = (projected(layer, part) for layer in (attention.to_q, attention.to_k, attention.to_v))
            compiled_attention(q, k, v, mixed[part].view_as(q), compiled.attend)

        self._threads.run(partial(heads, part) for part in self._parts(channels, HEAD_DIM))
        weights, bias = (each.float() for each in (attention.to_out[0].weight, attention.to_out[0].bias))

        def strip(top: int, bottom: int) -> Tensor:
            some = slice(top * width, bottom * width)
            y = linear(mixed[:, some].T, weights, bias).add_(rows[some])
            return y.view(1, bottom - top, width, channels).permute(0, 3, 1, 2)

        answer = self._by_strips((batch, channels, height, width), lambda _: strip)
        self._give_back(source)
        return answer

    # --- strips ---

    def _by_strips(self, shape: Shape, layer: Layer, widest: int = 1, weights: int = 0) -> FeatureMap:
        """The threads share the rows, or where there are more weights than pixels, the channels."""
        values = self._take(shape)
        _, channels, height, _ = shape
        by_channels = shared_by_channels(weights, values)
        rows = [(0, height)] if by_channels else spans(shape, widest, STRIP_BYTES, SHARES * self._threads.count)
        moments = torch.empty(len(rows), 2, 1, channels, dtype=torch.float64)

        def settle(strip: Strip, index: int, first: int = 0) -> None:
            top, bottom = rows[index]
            y, target = strip(top, bottom), in_memory(values)[top:bottom]
            compiled.settle(in_memory(y), target, first, moments[index].flatten(0, 1).numpy())

        if by_channels:
            parts = self._parts(channels, shares=1)
            self._threads.run(partial(lambda part: settle(layer(part), 0, part.start), part) for part in parts)
        else:
            strip = layer(slice(0, channels))
            self._threads.run(partial(settle, strip, index) for index in range(len(rows)))
        return joined(values, rows, moments)

    def _in_place(self, conv: nn.Conv2d, source: FeatureMap) -> bool:
        return not shared_by_channels(conv.weight.numel(), source.values)

    def _parts(self, channels: int, step: int = 1, shares: int = SHARES) -> list[slice]:
        """So many shares of the channels for each thread, `step` or a multiple each."""
        size = -(-channels // (step * shares * self._threads.count)) * step
        return [slice(first, min(first + size, channels)) for first in range(0, channels, size)]


def shared_by_channels(weights: int, values: Tensor) -> bool:
    """Whether the threads share a map's channels: each weight is then turned and read by one of them alone."""
    return weights > values.numel()


def in_memory(values: Tensor) -> Any:
    """[1, C, H, W], channels last -> NumPy's view, [H, W, C]."""
    return values[0].permute(1, 2, 0).numpy()
