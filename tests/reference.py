"""What the extension computes a second time, from diffusers' blocks, OpenCV and the paper's description."""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
from diffusers.models.unets.unet_2d_blocks import UNetMidBlock2D, get_down_block, get_up_block
from numpy.typing import NDArray
from torch import Tensor, nn

from lib_layerdiffuse.tensors import StateDict

RELEASED_WIDTHS = (32, 32, 64, 128, 256, 512, 512)
RELEASED_ATTENDS = (False, False, False, False, True, True, True)
SMALL_WIDTHS = (8,) * 7

COMMON = {"temb_channels": None, "resnet_eps": 1e-5, "resnet_act_fn": "silu", "attention_head_dim": 8}


class ReferenceDecoder(nn.Module):
    """The transparent decoder. `attends` says which down blocks have attention; up blocks mirror it."""

    def __init__(
        self,
        widths: Sequence[int] = SMALL_WIDTHS,
        attends: Sequence[bool] = RELEASED_ATTENDS,
        layers: int = 2,
        latent_channels: int = 4,
    ) -> None:
        super().__init__()
        last = len(widths) - 1
        mirrored = widths[::-1]
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.latent_conv_in = nn.Conv2d(latent_channels, widths[2], 1)
        self.down_blocks = nn.ModuleList(
            get_down_block(
                "AttnDownBlock2D" if attends[level] else "DownBlock2D",
                num_layers=layers,
                in_channels=widths[max(level - 1, 0)],
                out_channels=widths[level],
                add_downsample=level < last,
                downsample_padding=1,
                resnet_groups=4,
                **COMMON,
            )
            for level in range(len(widths))
        )
        self.mid_block = UNetMidBlock2D(in_channels=widths[-1], resnet_groups=4, attn_groups=4, **COMMON)
        self.up_blocks = nn.ModuleList(
            get_up_block(
                "AttnUpBlock2D" if attends[last - level] else "UpBlock2D",
                num_layers=layers + 1,
                prev_output_channel=mirrored[max(level - 1, 0)],
                out_channels=mirrored[level],
                in_channels=mirrored[min(level + 1, last)],
                add_upsample=level < last,
                resnet_groups=4,
                **COMMON,
            )
            for level in range(len(widths))
        )
        self.conv_norm_out = nn.GroupNorm(4, widths[0], eps=1e-5)
        self.conv_act = nn.SiLU()
        self.conv_out = nn.Conv2d(widths[0], 4, 3, padding=1)

    def forward(self, rgb: Tensor, latent: Tensor) -> Tensor:
        x = self.conv_in(rgb)
        residuals: tuple[Tensor, ...] = (x,)
        for level, block in enumerate(self.down_blocks):
            if level == 3:
                x = x + self.latent_conv_in(latent)
            x, states = block(hidden_states=x)
            residuals += states
        x = self.mid_block(x)
        for block in self.up_blocks:
            taken = len(block.resnets)
            x = block(hidden_states=x, res_hidden_states_tuple=residuals[-taken:])
            residuals = residuals[:-taken]
        return self.conv_out(self.conv_act(self.conv_norm_out(x)))


def reference_encoder(widths: Sequence[int] = (4, 8, 8, 8, 8, 8, 8, 8, 8, 4)) -> nn.Module:
    """The latent-offset encoder, layer by layer; its keys are the file's without "blocks."."""
    strides = (1, 1, 2, 1, 2, 1, 2, 1, 1)
    layers: list[nn.Module] = []
    for width_in, width_out, stride in zip(widths, widths[1:], strides):
        layers += [nn.Conv2d(width_in, width_out, 3, stride, 1), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def cv2_pad_colors(rgba: NDArray[np.float32]) -> NDArray[np.float32]:
    """Colour padding written with OpenCV's resizing, [H, W, 4] -> [H, W, 3]."""
    color, alpha = rgba[..., :3] * rgba[..., 3:], rgba[..., 3:]
    levels = [(color, alpha)]
    while min(alpha.shape[:2]) > 1:
        size = (int(alpha.shape[1] / 1.2), int(alpha.shape[0] / 1.2))
        color = cv2.resize(color, size, interpolation=cv2.INTER_AREA).reshape(*size[::-1], 3)
        alpha = cv2.resize(alpha, size, interpolation=cv2.INTER_AREA).reshape(*size[::-1], 1)
        levels.append((color, alpha))
    padded = (color.sum((0, 1)) / max(alpha.sum(), 1e-8)).reshape(1, 1, 3)
    for color, alpha in reversed(levels):
        below = cv2.resize(padded, alpha.shape[1::-1], interpolation=cv2.INTER_LINEAR).reshape(*alpha.shape[:2], 3)
        padded = color + below * (1 - alpha)
    return padded


def random_state_dict(net: nn.Module, seed: int = 0, prefix: str = "") -> StateDict:
    """The tensors of `net`, every one of them random (norms too), under keys with `prefix`; large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        spread = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3
        parameter.data.normal_(0, spread, generator=generator)
    return {prefix + key: value.clone() for key, value in net.state_dict().items()}
