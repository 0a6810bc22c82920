"""The latent-offset encoder: what to add to a picture's latent so that it carries the picture's transparency too.

Attribute names are the file's keys.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from lib_layerdiffuse.nets.loading import children, hold, shape
from lib_layerdiffuse.tensors import Argb, Latent, StateDict

STRIDED = (2, 4, 6)  # the convolutions that halve the size; not recoverable from the file


class TransparentEncoder(nn.Module):
    """3×3 convolutions with SiLU between, released widths: 4, 32, 32, 64, 64, 128, 128, 256, 256, 4."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index, (width_in, width_out) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(width_in, width_out, 3, stride=2 if index in STRIDED else 1, padding=1), nn.SiLU()]
        self.blocks = nn.Sequential(*layers[:-1])

    @classmethod
    def from_state_dict(cls, state_dict: StateDict) -> "TransparentEncoder":
        """The network that fits, holding the tensors as they are; LayerDiffuseError where there is none."""
        width_in = shape(state_dict, "blocks.0.weight")[1]
        convolutions = [f"blocks.{2 * index}" for index in range(children(state_dict, "blocks."))]
        with torch.device("meta"):
            net = cls([width_in, *(shape(state_dict, f"{each}.weight")[0] for each in convolutions)])
        return hold(net, state_dict)

    def forward(self, argb: Argb) -> Latent:
        """[B, 4, H, W] in [0, 1], colour padded -> the raw offset [B, C, H/8, W/8], yet to be scaled."""
        return self.blocks(argb)
