"""Winograd's convolution against a direct one."""

import pytest
import torch
from torch.nn import functional as F

from lib_layerdiffuse.nets import winograd
from lib_layerdiffuse.nets.scratch import Blocks, Scratch


@pytest.mark.parametrize(
    ("batch", "width_in", "width_out", "height", "width"),
    [(1, 5, 7, 4, 4), (2, 16, 8, 12, 20), (2, 8, 5, 6, 9)],  # the last: sides that do not end with a tile
)
def test_the_numbers_of_a_direct_convolution(batch, width_in, width_out, height, width):
    scratch = Scratch(Blocks())
    weights, bias = torch.randn(width_out, width_in, 3, 3) / (9 * width_in) ** 0.5, torch.randn(width_out)
    kernel = winograd.turned(weights, scratch)
    for _ in range(2):  # the second finds what the first has left in the scratch memory
        x = torch.randn(batch, width_in, height + 2, width + 2).contiguous(memory_format=torch.channels_last)
        answer = winograd.convolve(x, kernel, bias, scratch)
        assert answer.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(answer, F.conv2d(x, weights, bias), rtol=0, atol=5e-5)
