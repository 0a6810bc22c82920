"""The transparent decoder, a strip of rows at a time: the same numbers in less memory, and faster on a processor.

A feature map of the wide levels is far larger than a processor's caches (1024² pixels, 32 channels, float32: 128 MiB):
layer after layer, each waits for memory. Here a strip is normalised, activated and convolved while it is in the cache.
Every map is whole before the next layer reads it, so normalisation goes by the whole picture and no border shows.

The maps may be kept elsewhere (`storage`) than where they are computed: a GPU then holds the weights and a few strips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib_layerdiffuse.nets import winograd
from lib_layerdiffuse.nets.attention import narrow_attention
from lib_layerdiffuse.nets.decoder import HEAD_DIM, LATENT_LEVEL, TransparentDecoder
from lib_layerdiffuse.nets.products import add_pointwise, linear
from lib_layerdiffuse.nets.scratch import Blocks, Scratch
from lib_layerdiffuse.tensors import Argb, Latent, Rgb

STRIP_BYTES = 8 * 2**20  # of a layer's input or output: stays in the last cache
WORTH_TILES = 128  # channels; with fewer, Winograd's way with the tiles takes what it saves
WORTH_LARGE_TILES = 512  # the same where the picture is enlarged first, and could be convolved while it is small
WORTH_KERNEL = 256  # pixels of a map; with fewer, its way with the kernel takes more than convolving does

Normalising: TypeAlias = Sequence[tuple[Tensor, Tensor]]  # a scale and a shift of each source, [B, C, 1, 1], float32
Rows: TypeAlias = Callable[[int, int], Tensor]  # from row, to row -> [B, C, rows, W], channels last
# Twice [B, C, rows, W], channels last: a part of the answer, and what is to be added, if anything.
Summands: TypeAlias = tuple[Tensor, Tensor | None]
Strip: TypeAlias = Callable[[int, int], Summands]  # from row, to row
Layer: TypeAlias = Callable[[slice], Strip]  # of these channels of the answer


class FeatureMap(NamedTuple):
    """What a layer answered, and what normalising it needs to know."""

    values: Tensor  # [B, C, H, W], channels last in memory
    mean: Tensor  # of each channel, [B, C], float32
    variance: Tensor  # of each channel, [B, C], float32


def moments(x: Tensor) -> Tensor:
    """Mean and variance of each channel, [2, B, C], float32."""
    if x.device.type != "cpu":
        variance, mean = torch.var_mean(x.float(), (2, 3), correction=0)
        return torch.stack([mean, variance])
    # For channels last on a processor, thirty times faster than `var_mean`; it joins the pictures of a batch.
    of_each = [torch.batch_norm_update_stats(picture[None].float(), None, None, 0.0) for picture in x]
    return torch.stack([torch.stack(each) for each in zip(*of_each)])


def settle(y: Tensor, beside: Tensor | None, target: Tensor) -> Tensor:
    """A strip, and what is to be added, into its place in the map; the moments of both together."""
    y = y if beside is None else y + beside
    target.copy_(y)
    return moments(y)


def spans(values: Tensor, widest: int, strip_bytes: int, strips: int = 1) -> list[tuple[int, int]]:
    """From row, to row: a map in at least so many strips, in which `widest` channels as wide take so many bytes."""
    batch, channels, height, width = values.shape
    step = winograd.TILE  # even, too, for upsampling
    row_bytes = values.element_size() * batch * max(channels, widest) * width
    fitting = min(strip_bytes // row_bytes, height // strips)
    rows = max(step, fitting // step * step)
    return [(top, min(top + rows, height)) for top in range(0, height, rows)]


def joined(values: Tensor, strips: Sequence[tuple[int, int]], of_each: Tensor) -> FeatureMap:
    """With the moments of its strips, [strips, 2, B, C], within and between them (Chan, Golub, LeVeque 1983)."""
    means, variances = of_each.unbind(1)
    shares = torch.tensor([(bottom - top) / values.shape[2] for top, bottom in strips]).to(means).view(-1, 1, 1)
    mean = (shares * means).sum(0)
    variance = (shares * (variances + (means - mean).square())).sum(0)
    return FeatureMap(values, mean.float(), variance.float())


def normalisation(sources: Sequence[FeatureMap], norm: nn.GroupNorm) -> Normalising:
    """`norm` of all sources, joined in channels."""
    means = torch.cat([source.mean for source in sources], dim=1).unflatten(1, (norm.num_groups, -1))
    variances = torch.cat([source.variance for source in sources], dim=1).unflatten(1, (norm.num_groups, -1))
    mean = means.mean(2, keepdim=True)
    variance = (variances + (means - mean).square()).mean(2, keepdim=True)
    scale = norm.weight.float().view(norm.num_groups, -1) * (variance + norm.eps).rsqrt()
    shift = norm.bias.float().view(norm.num_groups, -1) - mean * scale
    widths = [source.values.shape[1] for source in sources]
    return list(zip(*(each.flatten(1)[..., None, None].split(widths, dim=1) for each in (scale, shift))))


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def upsampling_weights(weights: Tensor) -> Tensor:
    """A 3×3 convolution of a picture made of equal 2×2 pixels, as four 2×2 convolutions of the small picture.

    Two of three rows (columns) fall on the same small pixel, so their weights are added: 16 products for 36.
    [out, in, 3, 3] -> [4·out, in, 2, 2]: for even rows and even columns, even and odd, odd and even, odd and odd.
    """

    def merged(w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        first, second, third = w.unbind(dim)
        return torch.stack([first, second + third], dim), torch.stack([first + second, third], dim)

    four = [columns for rows in merged(weights.float(), 2) for columns in merged(rows, 3)]
    return channels_last(torch.cat(four).to(weights.dtype))


def convolve_as_product(x: Tensor, weights: Tensor, bias: Tensor, stride: int, scratch: Scratch) -> Tensor:
    """`F.conv2d` as one product of matrices: for few pixels, weights take longest to rearrange."""
    width_out, width_in, _, _ = weights.shape
    windows = x.unfold(2, 3, stride).unfold(3, 3, stride).permute(0, 2, 3, 1, 4, 5)  # -> [B, H, W, in, 3, 3]
    batch, height, width = windows.shape[:3]
    columns = scratch("gathered", *windows.shape).copy_(windows).view(-1, 9 * width_in)
    return linear(columns, weights.flatten(1), bias).view(batch, height, width, width_out).permute(0, 3, 1, 2)


class StripDecoder:
    """Answers as `net` does; keeps the memory of its maps for the next picture.

    storage: where the maps are kept; default: where the network is.
    precision: of the maps; default: the network's. Convolutions and attention run in the network's.
    """

    def __init__(
        self, net: TransparentDecoder, storage: torch.device | None = None, precision: torch.dtype | None = None
    ) -> None:
        weight = net.conv_in.weight
        self.net = net
        self.device = weight.device
        self.storage = storage or weight.device
        self.precision = precision or weight.dtype
        # An answer rounded to bfloat16 would be up to half a step of 255 off by that alone.
        self._last = deepcopy(net.conv_out).float() if self.precision == torch.bfloat16 else net.conv_out
        self._floats_on_cpu = self.device.type == "cpu" and self.precision == torch.float32
        self._blocks = Blocks(self.storage)
        self._scratch = Scratch(self._blocks if self.device == self.storage else Blocks(self.device), self.precision)

    def __call__(self, rgb: Rgb, latent: Latent) -> Argb:
        """The raw answer, not clipped to [0, 1], in storage."""
        net: Any = self.net
        pixels = self._whole(rgb)
        x = self._convolve([pixels], net.conv_in)
        self._give_back(pixels)
        skips = [x]
        for level, block in enumerate(net.down_blocks):
            if level == LATENT_LEVEL:
                x = self._whole(x.values.to(self.device) + net.latent_conv_in(latent.to(net.conv_in.weight)))
            for resnet, attention in zip(block.resnets, block.attentions):
                x = self._attend(self._resnet([x], resnet, last_use=x is not skips[-1]), attention)
                skips.append(x)
            for downsample in block.downsamplers:
                x = self._convolve([x], downsample.conv, stride=2)
                skips.append(x)
        first, second = net.mid_block.resnets
        x = self._attend(self._resnet([x], first), net.mid_block.attentions[0])
        x = self._resnet([x], second, last_use=True)
        for block in net.up_blocks:
            for resnet, attention in zip(block.resnets, block.attentions):
                x = self._attend(self._resnet([x, skips.pop()], resnet, last_use=True), attention)
            for upsample in block.upsamplers:
                x = self._upsample(x, upsample.conv)
        shape, precision = (len(rgb), self._last.out_channels, *rgb.shape[2:]), self._answers_in(self._last)
        # The caller's, so none of the blocks.
        answer = torch.empty(shape, dtype=precision, device=self.storage, memory_format=torch.channels_last)
        self._convolve([x], self._last, net.conv_norm_out, into=answer)
        self._give_back(x)
        return answer

    # --- layers ---

    def _resnet(self, sources: Sequence[FeatureMap], resnet: Any, last_use: bool = False) -> FeatureMap:
        """last_use: nobody needs the sources after this."""
        batch, _, height, width = sources[0].values.shape
        shape = batch, resnet.conv1.out_channels, height, width
        exact = self._take(shape, resnet.conv1.weight.dtype)  # the convolution's, so nothing is lost
        hidden = self._convolve(sources, resnet.conv1, resnet.norm1, into=exact)
        ended = sources if last_use else ()
        alike = [each.values for each in ended if each.values.shape == shape]
        into = alike[0] if alike and self._in_place(resnet.conv2, hidden) else None
        answer = self._convolve(
            [hidden], resnet.conv2, resnet.norm2, shortcut=(sources, resnet.conv_shortcut), into=into
        )
        self._give_back(hidden, *(each for each in ended if each.values is not into))
        return answer

    def _convolve(
        self,
        sources: Sequence[FeatureMap],
        conv: Any,
        norm: nn.GroupNorm | None = None,
        shortcut: tuple[Sequence[FeatureMap], nn.Module] | None = None,
        stride: int = 1,
        into: Tensor | None = None,
    ) -> FeatureMap:
        """A 3×3 convolution of the sources, joined in channels; first normalised and activated, if `norm` is given.

        into: where the answer should lie; one of the sources of the shortcut, if nobody needs it after this.
        """
        batch, _, height, width = sources[0].values.shape
        normalising = normalisation(sources, norm) if norm else None
        weights, bias = conv.weight, conv.bias

        def layer(part: slice) -> Strip:
            convolved = self._convolved(sources, normalising, weights[part], bias[part], stride)
            if not shortcut:
                return lambda top, bottom: (convolved(top, bottom), None)
            beside = self._shortcut(*shortcut, part)
            return lambda top, bottom: beside(convolved(top, bottom), top, bottom)

        if into is None:
            shape = batch, conv.out_channels, height // stride, width // stride
            into = self._take(shape, self._answers_in(conv))
        return self._by_strips(into, layer, stride**2 * conv.in_channels, weights.numel())

    def _convolved(
        self, sources: Sequence[FeatureMap], normalising: Normalising | None, weights: Tensor, bias: Tensor, stride: int
    ) -> Rows:
        """What convolves strips of the sources, to the channels that these weights are of."""
        batch, _, height, width = sources[0].values.shape
        convolve = self._convolution(weights, bias, stride, batch * height * width)
        read = self._reader(sources, normalising)
        return lambda top, bottom: convolve(read(top * stride - 1, (bottom - 1) * stride + 2))

    def _convolution(self, weights: Tensor, bias: Tensor, stride: int, pixels: int) -> Callable[[Tensor], Tensor]:
        """What convolves a strip of a map that has so many pixels."""
        if self._floats_on_cpu and weights.dtype == torch.float32:
            if stride == 1 and min(weights.shape[:2]) >= WORTH_TILES and pixels >= WORTH_KERNEL:
                kernel = self._turned(weights)
                return lambda x: winograd.convolve(x, kernel, bias, self._scratch)
            if pixels < WORTH_KERNEL:
                return lambda x: convolve_as_product(x, weights, bias, stride, self._scratch)
        weights = channels_last(weights)
        return lambda x: channels_last(F.conv2d(x.to(weights), weights, bias, stride))

    def _turned(self, weights: Tensor) -> Tensor:
        """As Winograd's convolution takes them."""
        return winograd.turned(weights, self._scratch)

    def _shortcut(
        self, sources: Sequence[FeatureMap], conv: Any, part: slice
    ) -> Callable[[Tensor, int, int], Summands]:
        """What makes of y the strip: with rows of the source beside; a 1×1 convolution of all is added in place."""

        def rows(source: FeatureMap, top: int, bottom: int) -> Tensor:
            return source.values[:, :, top:bottom].to(self.device)

        if isinstance(conv, nn.Identity):
            return lambda y, top, bottom: (y, rows(sources[0], top, bottom)[:, part])
        weights, bias = (each[part].to(self.precision) for each in (conv.weight, conv.bias))
        of_each = weights.split([source.values.shape[1] for source in sources], dim=1)

        def add(y: Tensor, top: int, bottom: int) -> Summands:
            y = y.to(self.precision)
            for source, its_weights, once in zip_longest(sources, of_each, [bias]):
                add_pointwise(y, rows(source, top, bottom), its_weights, once)
            return y, None

        return add

    def _upsample(self, source: FeatureMap, conv: Any) -> FeatureMap:
        """Twice the size, each pixel four times, then convolved."""
        batch, channels, height, width = source.values.shape

        def layer(part: slice) -> Strip:
            enlarge = self._enlargement(conv.weight[part], conv.bias[part], 4 * batch * height * width)
            read = self._reader([source])
            return lambda top, bottom: (enlarge(read(top // 2 - 1, bottom // 2 + 1)), None)

        large = self._take((batch, channels, 2 * height, 2 * width))
        answer = self._by_strips(large, layer, weights=conv.weight.numel())
        self._give_back(source)
        return answer

    def _enlargement(self, weights: Tensor, bias: Tensor, pixels: int) -> Callable[[Tensor], Tensor]:
        """What enlarges and convolves a strip, for an answer that has so many pixels."""
        if self._floats_on_cpu and weights.shape[1] >= WORTH_LARGE_TILES:
            convolve = self._convolution(weights, bias, 1, pixels)
            return lambda small: convolve(F.interpolate(small, scale_factor=2.0)[:, :, 1:-1, 1:-1])
        weights, bias = upsampling_weights(weights), bias.repeat(4)

        def four_in_one(small: Tensor) -> Tensor:
            batch, _, rows, columns = small.shape
            height, width = rows - 2, columns - 2
            parts = F.conv2d(small.to(weights), weights, bias).chunk(4, dim=1)
            y = self._scratch("answer", batch, 2 * height, 2 * width, parts[0].shape[1]).permute(0, 3, 1, 2)
            for index, part in enumerate(parts):
                row, column = divmod(index, 2)
                y[:, :, row::2, column::2] = part[:, :, row : row + height, column : column + width]
            return y

        return four_in_one

    def _attend(self, source: FeatureMap, attention: Any) -> FeatureMap:
        """The source with its attention added, where the block has one."""
        if isinstance(attention, nn.Identity):
            return source
        [(scale, shift)] = normalisation([source], attention.group_norm)
        x = source.values.to(self.device)
        tokens = torch.addcmul(shift, x, scale).permute(0, 2, 3, 1).flatten(1, 2)  # -> [B, HW, C]
        mixed = self._mix(tokens.to(attention.to_q.weight), attention)
        answer = attention.to_out[0](mixed).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        self._give_back(source)
        return self._whole(x + answer)

    def _mix(self, tokens: Tensor, attention: Any) -> Tensor:
        q, k, v = (
            project(tokens).unflatten(2, (-1, HEAD_DIM)).transpose(1, 2)  # -> [B, heads, HW, HEAD_DIM]
            for project in (attention.to_q, attention.to_k, attention.to_v)
        )
        if self._floats_on_cpu:
            mixed = narrow_attention(q.float(), k.float(), v.float(), self._scratch)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v)
        return mixed.transpose(1, 2).flatten(2).to(tokens)

    # --- strips ---

    def _by_strips(self, values: Tensor, layer: Layer, widest: int = 1, weights: int = 0) -> FeatureMap:
        """The map that `layer` makes of so many weights, reading `widest` channels as wide, into these values."""
        strip, strips = layer(slice(0, values.shape[1])), spans(values, widest, STRIP_BYTES)
        found = []
        for top, bottom in strips:
            found.append(settle(*strip(top, bottom), values[:, :, top:bottom]))
        self._scratch.give_back()
        return joined(values, strips, torch.stack(found))

    def _in_place(self, conv: nn.Conv2d, source: FeatureMap) -> bool:
        """Whether a strip of what `conv` makes is written only when nobody reads those rows any more."""
        return True

    def _reader(self, sources: Sequence[FeatureMap], normalising: Normalising | None = None) -> Rows:
        """What reads strips of the sources, normalised and activated, if those are given."""
        return partial(self._read, sources, normalising)

    def _read(self, sources: Sequence[FeatureMap], normalising: Normalising | None, top: int, bottom: int) -> Tensor:
        """Rows of the sources joined in channels, with a column more at each side; zero beyond the picture."""
        batch, _, height, width = sources[0].values.shape
        channels = sum(source.values.shape[1] for source in sources)
        x = self._scratch("strip", batch, bottom - top, width + 2, channels).permute(0, 3, 1, 2)
        inside = slice(max(top, 0), min(bottom, height))
        first, last = inside.start - top, inside.stop - top
        for beyond in (x[:, :, :first], x[:, :, last:], x[..., :1], x[..., -1:]):
            beyond.zero_()
        parts = x[:, :, first:last, 1:-1].split([source.values.shape[1] for source in sources], dim=1)
        for index, (part, source) in enumerate(zip(parts, sources)):
            rows = source.values[:, :, inside]
            if normalising:
                scale, shift = normalising[index]
                torch.addcmul(shift, rows.to(self.device), scale, out=part)
            else:
                part.copy_(rows)
        if normalising:
            F.silu(x, inplace=True)
        return x

    # --- maps ---

    def _answers_in(self, conv: nn.Conv2d) -> torch.dtype:
        return torch.promote_types(conv.weight.dtype, self.precision)

    def _whole(self, values: Tensor) -> FeatureMap:
        return joined(self._take(values.shape).copy_(values), [(0, values.shape[2])], moments(values)[None])

    def _take(self, shape: Sequence[int], precision: torch.dtype | None = None) -> Tensor:
        batch, channels, height, width = shape
        return self._blocks.take(precision or self.precision, batch, height, width, channels).permute(0, 3, 1, 2)

    def _give_back(self, *maps: FeatureMap) -> None:
        self._blocks.give_back(*(each.values for each in maps))
