"""The transparent decoder in strips of rows, or of channels, shared by the threads of a team."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib_layerdiffuse.cpu.attention import kernel, mix
from lib_layerdiffuse.cpu.threads import Team
from lib_layerdiffuse.nets.decoder import HEAD_DIM, LATENT_LEVEL, TransparentDecoder
from lib_layerdiffuse.tensors import Argb, Latent, Rgb

STRIP_BYTES = 2 * 2**20  # of a layer's input or output: stays in a core's cache
SHARES = 2  # of a layer, at least, for each thread: none waits for long for another
VECTOR = 16  # channels that are never divided
LARGE = 2**17  # pixels; with fewer the plain network is as fast

Normalising: TypeAlias = Sequence[tuple[Tensor, Tensor]]  # a scale and a shift of each source, [C, 1, 1]
Shortcut: TypeAlias = Callable[[Tensor, slice, slice], object]  # adds to these channels and rows
Piece: TypeAlias = tuple[slice, slice]  # channels and rows


class FeatureMap(NamedTuple):
    """What a layer answered, and what normalising it needs to know."""

    values: Tensor  # [1, C, H, W], channels last in memory
    mean: Tensor  # of each channel, [C]
    variance: Tensor  # of each channel, [C]


class Memory:
    """Memory of maps that nobody refers to any more, for the next of that size: fresh pages cost a sixth of a pass."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)  # by how many numbers they hold

    def map(self, channels: int, height: int, width: int) -> Tensor:
        free = self._free[channels * height * width]
        numbers = free.pop() if free else torch.empty(channels * height * width)
        values = numbers.view(1, height, width, channels).permute(0, 3, 1, 2)
        finalize(values, free.append, numbers)
        return values


class FastDecoder:
    """Answers as `net` does, on a processor and in float32, wherever and in whatever precision its weights are."""

    def __init__(self, net: TransparentDecoder) -> None:
        weights = {name: weight.to("cpu", torch.float32) for name, weight in net.state_dict().items()}
        self._net = TransparentDecoder.from_state_dict(weights)  # float32 ones on a processor are not copied
        self._team = Team()
        self._memory = Memory()

    @torch.no_grad()
    def __call__(self, rgb: Rgb, latent: Latent) -> Argb:
        """One picture after another: the raw answer, not clipped to [0, 1]."""
        rgb, latent = rgb.float(), latent.float()
        if rgb[0, 0].numel() < LARGE:
            return self._net(rgb, latent)
        return torch.cat([self._decode(*one) for one in zip(rgb.split(1), latent.split(1))])

    def _decode(self, rgb: Rgb, latent: Latent) -> Argb:
        net: Any = self._net
        x = self._convolve([self._whole(rgb)], net.conv_in)
        skips = [x]
        for level, block in enumerate(net.down_blocks):
            if level == LATENT_LEVEL:
                x = self._whole(x.values + net.latent_conv_in(latent))
            for resnet, attention in zip(block.resnets, block.attentions):
                x = self._attend(self._resnet([x], resnet), attention)
                skips.append(x)
            for downsample in block.downsamplers:
                x = self._convolve([x], downsample.conv)
                skips.append(x)
        first, second = net.mid_block.resnets
        x = self._resnet([self._attend(self._resnet([x], first), net.mid_block.attentions[0])], second)
        for block in net.up_blocks:
            for resnet, attention in zip(block.resnets, block.attentions):
                x = self._attend(self._resnet([x, skips.pop()], resnet), attention)
            for upsample in block.upsamplers:
                x = self._convolve([x], upsample.conv, enlarged=True)
        return self._convolve([x], net.conv_out, net.conv_norm_out).values

    # --- layers ---

    def _resnet(self, sources: Sequence[FeatureMap], resnet: Any) -> FeatureMap:
        hidden = self._convolve(sources, resnet.conv1, resnet.norm1)
        return self._convolve([hidden], resnet.conv2, resnet.norm2, shortcut_of(sources, resnet.conv_shortcut))

    def _convolve(
        self,
        sources: Sequence[FeatureMap],
        conv: nn.Conv2d,
        norm: nn.GroupNorm | None = None,
        shortcut: Shortcut | None = None,
        enlarged: bool = False,
    ) -> FeatureMap:
        """A 3×3 convolution of the sources, joined in channels; first normalised and activated, or twice as large."""
        height, width = (side * (1 + enlarged) // conv.stride[0] for side in sources[0].values.shape[2:])
        normalising = normalisation(sources, norm) if norm else None
        # Few pixels, and so divided by channels: to turn the weights around would take longer than to use them.
        ordered = Tensor.contiguous if conv.weight.numel() > height * width * conv.out_channels else channels_last
        weight, bias, stride = ordered(conv.weight), conv.bias, conv.stride[0]

        def piece(channels: slice, rows: slice) -> Tensor:
            if enlarged:
                small = read(sources, normalising, rows.start // 2 - 1, rows.stop // 2 + 1)
                x = F.interpolate(small, scale_factor=2.0)[:, :, 1:-1, 1:-1]
            else:
                x = read(sources, normalising, rows.start * stride - 1, (rows.stop - 1) * stride + 2)
            y = F.conv2d(ordered(x), weight[channels], None if bias is None else bias[channels], stride)
            if shortcut:
                shortcut(y, channels, rows)
            return y

        values = self._memory.map(conv.out_channels, height, width)
        read_of_row = sum(source.values[0, :, 0].numel() for source in sources) * stride
        return self._by_pieces(values, self._pieces(values, read_of_row, weight.numel()), piece)

    def _attend(self, source: FeatureMap, attention: Any) -> FeatureMap:
        """The source with its attention added, where the block has one."""
        if isinstance(attention, nn.Identity):
            return source
        [(scale, shift)] = normalisation([source], attention.group_norm)
        attend = kernel()
        _, channels, height, width = source.values.shape
        x = source.values[0].flatten(1)  # -> [C, HW]
        mixed = torch.empty(channels, height * width)

        def heads(part: slice) -> None:
            tokens = torch.addcmul(shift[..., 0], x, scale[..., 0])  # again in each thread: next to nothing
            q, k, v = (
                torch.addmm(layer.bias[part, None], layer.weight[part], tokens).unflatten(0, (-1, HEAD_DIM))
                for layer in (attention.to_q, attention.to_k, attention.to_v)
            )
            mixed[part] = mix(q, k, v, attend).flatten(0, 1)

        self._team.run(partial(heads, part) for part in self._parts(channels, HEAD_DIM))
        weight, bias = attention.to_out[0].weight, attention.to_out[0].bias

        def piece(part: slice, rows: slice) -> Tensor:
            answer = F.linear(mixed[:, rows.start * width : rows.stop * width].T, weight, bias)
            return answer.T.view(1, channels, -1, width) + source.values[:, :, rows]

        values = self._memory.map(channels, height, width)
        return self._by_pieces(values, self._pieces(values), piece)

    # --- pieces ---

    def _whole(self, values: Tensor) -> FeatureMap:
        everything = self._memory.map(*values.shape[1:])
        return self._by_pieces(everything, self._pieces(everything), lambda channels, rows: values[:, :, rows])

    def _by_pieces(self, values: Tensor, pieces: Sequence[Piece], make: Callable[[slice, slice], Tensor]) -> FeatureMap:
        """The map with what is made for each piece, and its moments: within the pieces of a channel, and between them.

        (Chan, Golub, LeVeque 1983)
        """
        height, channels = values.shape[2], values.shape[1]
        found = torch.zeros(len(pieces), 3, channels)  # share of the rows, mean and variance

        def settle(index: int, part: slice, rows: slice) -> None:
            y = channels_last(make(part, rows))
            values[:, part, rows] = y
            found[index, 0, part] = (rows.stop - rows.start) / height
            # For channels last thirty times faster than `var_mean`.
            found[index, 1:, part] = torch.stack(torch.batch_norm_update_stats(y, None, None, 0.0))

        self._team.run(partial(settle, index, *piece) for index, piece in enumerate(pieces))
        shares, means, variances = found.unbind(1)
        mean = (shares * means).sum(0)
        return FeatureMap(values, mean, (shares * (variances + (means - mean).square())).sum(0))

    def _pieces(self, values: Tensor, read_of_row: int = 1, weights: int = 0) -> list[Piece]:
        """Strips of rows; or, where there are more weights than values, of channels: each weight is read once.

        read_of_row: numbers that a row is made of.
        """
        _, channels, height, width = values.shape
        if weights > values.numel():
            return [(part, slice(0, height)) for part in self._parts(channels, VECTOR)]
        fitting = STRIP_BYTES // (values.element_size() * max(channels * width, read_of_row))
        rows = max(2, min(fitting, height // (SHARES * self._team.size)) // 2 * 2)  # even, for enlarging
        return [(slice(0, channels), slice(top, min(top + rows, height))) for top in range(0, height, rows)]

    def _parts(self, channels: int, step: int) -> list[slice]:
        """SHARES of the channels for each thread, `step` or a multiple each."""
        size = -(-channels // (step * SHARES * self._team.size)) * step
        return [slice(first, min(first + size, channels)) for first in range(0, channels, size)]


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def normalisation(sources: Sequence[FeatureMap], norm: nn.GroupNorm) -> Normalising:
    """`norm` of all sources, joined in channels."""
    means, variances = (
        torch.cat([source[which] for source in sources]).unflatten(0, (norm.num_groups, -1)) for which in (1, 2)
    )
    mean = means.mean(1, keepdim=True)
    variance = (variances + (means - mean).square()).mean(1, keepdim=True)
    scale = norm.weight.view_as(means) * (variance + norm.eps).rsqrt()
    shift = norm.bias.view_as(means) - mean * scale
    widths = [source.values.shape[1] for source in sources]
    return list(zip(*(each.flatten()[:, None, None].split(widths) for each in (scale, shift))))


def read(sources: Sequence[FeatureMap], normalising: Normalising | None, top: int, bottom: int) -> Tensor:
    """Rows of the sources, joined in channels, with a column more at each side; zero beyond the picture."""
    _, _, height, width = sources[0].values.shape
    widths = [source.values.shape[1] for source in sources]
    x = torch.empty(1, sum(widths), bottom - top, width + 2, memory_format=torch.channels_last)
    first, last = max(top, 0), min(bottom, height)
    for beyond in (x[:, :, : first - top], x[:, :, last - top :], x[..., :1], x[..., -1:]):
        beyond.zero_()
    parts = x[:, :, first - top : last - top, 1:-1].split(widths, dim=1)
    for index, (part, source) in enumerate(zip(parts, sources)):
        rows = source.values[:, :, first:last]
        if normalising:
            scale, shift = normalising[index]
            torch.addcmul(shift, rows, scale, out=part)
        else:
            part.copy_(rows)
    return F.silu(x, inplace=True) if normalising else x


def shortcut_of(sources: Sequence[FeatureMap], conv: Any) -> Shortcut:
    """What adds the source, or a 1×1 convolution of all sources."""
    if isinstance(conv, nn.Identity):
        return lambda y, part, rows: y.add_(sources[0].values[:, part, rows])
    weights = conv.weight.split([source.values.shape[1] for source in sources], dim=1)
    biases: Iterable[Tensor | None] = [conv.bias, *[None] * (len(sources) - 1)]

    def add(y: Tensor, part: slice, rows: slice) -> None:
        for source, weight, bias in zip(sources, weights, biases):
            y += F.conv2d(source.values[:, :, rows], weight[part], None if bias is None else bias[part])

    return add
