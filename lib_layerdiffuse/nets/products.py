"""Linear maps on a processor by oneDNN, which PyTorch brings for its convolutions.

PyTorch itself computes those of single precision by MKL there, which takes up to twice as long on AMD's processors; in
bfloat16 its own way to oneDNN takes a third more time for narrow maps (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# As PyTorch's own compiler calls it; it knows no gradients.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_convolution_pointwise_")
)
PRECISIONS = [torch.float32]
if HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    PRECISIONS.append(torch.bfloat16)


def _suits_onednn(x: Tensor) -> bool:
    return HAS_ONEDNN and x.device.type == "cpu" and x.dtype in PRECISIONS and not x.requires_grad


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, [..., in] -> [..., out], of one precision on one device.

    weight, bias: without gradients.
    """
    if not _suits_onednn(x):
        return F.linear(x, weight, bias)
    # Of a view with gaps between its rows it would take a thousand times as long.
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")


def add_pointwise(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """To y, [B, out, H, W], a 1×1 convolution of x, [B, in, H, W], in place; channels last, without gradients."""
    if not _suits_onednn(x):
        y += F.conv2d(x, weight, bias)
        return
    x, weight = (each.contiguous(memory_format=torch.channels_last) for each in (x, weight))
    geometry = [0, 0], [1, 1], [1, 1], 1  # padding, stride, dilation, groups
    torch.ops.mkldnn._convolution_pointwise_.binary(y, x, weight, bias, *geometry, "add", 1, None, [], None)
