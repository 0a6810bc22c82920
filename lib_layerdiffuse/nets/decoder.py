"""The transparent decoder: a UNet over pixels that sees the latent too and answers with alpha and colour.

Attribute names are the file's keys (diffusers' UNet layout, without time embedding).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.nets.loading import children, hold, shape
from lib_layerdiffuse.tensors import Argb, Latent, Rgb, StateDict

# Not recoverable from the file; the first three from the released network's configuration.
HEAD_DIM = 8
GROUPS = 4
EPS = 1e-5
LATENT_LEVEL = 3  # the latent joins where three strided convolutions have brought the pixels to its size


def group_norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, EPS)


def conv3(width_in: int, width_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width_in, width_out, 3, stride, padding=1)


class ResNet(nn.Module):
    """Twice norm, SiLU, convolution, beside a shortcut: [B, width_in, H, W] -> [B, width_out, H, W]."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1 = group_norm(width_in)
        self.conv1 = conv3(width_in, width_out)
        self.norm2 = group_norm(width_out)
        self.conv2 = conv3(width_out, width_out)
        self.conv_shortcut = nn.Identity() if width_in == width_out else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x), inplace=True))
        y = self.conv2(F.silu(self.norm2(y), inplace=True))
        return self.conv_shortcut(x) + y


class SelfAttention(nn.Module):
    """Attention among all pixels, added to its input: [B, C, H, W] -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.group_norm = group_norm(width)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # -> [B, HW, C]
        q, k, v = (
            project(tokens).unflatten(2, (-1, HEAD_DIM)).transpose(1, 2)  # -> [B, heads, HW, HEAD_DIM]
            for project in (self.to_q, self.to_k, self.to_v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # -> [B, HW, C]
        return x + self.to_out[0](mixed).transpose(1, 2).unflatten(2, x.shape[2:])


class Downsample(nn.Module):
    """[B, C, H, W] -> [B, C, H/2, W/2]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv3(width, width, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """[B, C, H, W] -> [B, C, 2H, 2W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = conv3(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def attentions(width: int, count: int, attends: bool) -> nn.ModuleList:
    """One module to follow each of `count` ResNets; where the block has no attention, one that does nothing."""
    return nn.ModuleList(SelfAttention(width) if attends else nn.Identity() for _ in range(count))


class DownBlock(nn.Module):
    """ResNets, each with its attention, then half the size (but not in the last block)."""

    def __init__(self, width_in: int, width: int, layers: int, attends: bool, resamples: bool) -> None:
        super().__init__()
        widths_in = [width_in] + [width] * (layers - 1)
        self.resnets = nn.ModuleList(ResNet(each, width) for each in widths_in)
        self.attentions = attentions(width, layers, attends)
        self.downsamplers = nn.ModuleList([Downsample(width)] if resamples else [])

    def forward(self, x: Tensor) -> list[Tensor]:
        """All hidden states, for the way up; the last one is the block's output."""
        states = []
        for resnet, attention in zip(self.resnets, self.attentions):
            x = attention(resnet(x))
            states.append(x)
        return states + [downsample(x) for downsample in self.downsamplers]


class MidBlock(nn.Module):
    """ResNet, attention, ResNet: [B, width, H, W] -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([ResNet(width, width), ResNet(width, width)])
        self.attentions = attentions(width, 1, attends=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class UpBlock(nn.Module):
    """The mirror of a DownBlock: one ResNet per state kept on the way down, then twice the size."""

    def __init__(self, width_in: int, width: int, skips: Sequence[int], attends: bool, resamples: bool) -> None:
        super().__init__()
        widths_in = [width_in] + [width] * (len(skips) - 1)
        self.resnets = nn.ModuleList(ResNet(each + skip, width) for each, skip in zip(widths_in, skips))
        self.attentions = attentions(width, len(skips), attends)
        self.upsamplers = nn.ModuleList([Upsample(width)] if resamples else [])

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        """Takes what it needs off the end of `skips`."""
        for resnet, attention in zip(self.resnets, self.attentions):
            x = attention(resnet(torch.cat([x, skips.pop()], dim=1)))
        for upsample in self.upsamplers:
            x = upsample(x)
        return x


def check_widths(widths: Sequence[int]) -> None:
    if len(widths) <= LATENT_LEVEL or any(width % HEAD_DIM for width in widths):
        raise LayerDiffuseError(
            f"The weight file is no transparent decoder: found down blocks {list(widths)} wide, expected more than "
            f"{LATENT_LEVEL} of them, each a multiple of {HEAD_DIM} wide"
        )


class TransparentDecoder(nn.Module):
    """Pixels and their latent -> alpha and colour. Height and width are multiples of 2^(blocks − 1), released: 64.

    widths: one per down block, released: 32, 32, 64, 128, 256, 512, 512
    layers: ResNets per down block (up blocks have one more), released: 2
    attends: which down blocks have attention (up blocks mirror it), released: the last three
    """

    def __init__(
        self,
        widths: Sequence[int],
        layers: int,
        attends: Sequence[bool],
        rgb_channels: int,
        latent_channels: int,
        argb_channels: int,
    ) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = conv3(rgb_channels, widths[0])
        self.latent_conv_in = nn.Conv2d(latent_channels, widths[LATENT_LEVEL - 1], 1)

        width, skips = widths[0], [widths[0]]
        self.down_blocks = nn.ModuleList()
        for level, width_out in enumerate(widths):
            resamples = level != last
            self.down_blocks.append(DownBlock(width, width_out, layers, attends[level], resamples))
            width = width_out
            skips += [width] * (layers + resamples)

        self.mid_block = MidBlock(width)

        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            joined = [skips.pop() for _ in range(layers + 1)]
            self.up_blocks.append(UpBlock(width, widths[level], joined, attends[level], resamples=level != 0))
            width = widths[level]

        self.conv_norm_out = group_norm(width)
        self.conv_out = conv3(width, argb_channels)

    @classmethod
    def from_state_dict(cls, state_dict: StateDict) -> "TransparentDecoder":
        """The network that fits, holding the tensors as they are; LayerDiffuseError where there is none."""
        blocks = [f"down_blocks.{level}" for level in range(children(state_dict, "down_blocks."))]
        widths = [shape(state_dict, f"{block}.resnets.0.conv1.weight")[0] for block in blocks]
        check_widths(widths)
        with torch.device("meta"):
            net = cls(
                widths=widths,
                layers=children(state_dict, "down_blocks.0.resnets."),
                attends=[children(state_dict, f"{block}.attentions.") > 0 for block in blocks],
                rgb_channels=shape(state_dict, "conv_in.weight")[1],
                latent_channels=shape(state_dict, "latent_conv_in.weight")[1],
                argb_channels=shape(state_dict, "conv_out.weight")[0],
            )
        return hold(net, state_dict)

    def forward(self, rgb: Rgb, latent: Latent) -> Argb:
        """The raw answer, not clipped to [0, 1]; the input may be in another precision."""
        rgb, latent = (each.to(self.conv_in.weight) for each in (rgb, latent))
        x = self.conv_in(rgb)
        skips = [x]
        for level, block in enumerate(self.down_blocks):
            if level == LATENT_LEVEL:
                x = x + self.latent_conv_in(latent)
            states = block(x)
            skips += states
            x = states[-1]
        x = self.mid_block(x)
        for block in self.up_blocks:
            x = block(x, skips)
        return self.conv_out(F.silu(self.conv_norm_out(x)))
