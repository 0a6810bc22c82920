"""Linear maps of single precision on a processor, by oneDNN, which PyTorch brings for its convolutions.

PyTorch itself computes them by MKL there, which takes up to twice as long on AMD's processors (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# As PyTorch's own compiler calls it; it knows no gradients.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _suits_onednn(x: Tensor) -> bool:
    return HAS_ONEDNN and x.device.type == "cpu" and x.dtype == torch.float32 and not x.requires_grad


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias, [..., in] -> [..., out], of one precision on one device. weight, bias: without gradients."""
    if _suits_onednn(x):
        # Of a view with gaps between its rows it would take a thousand times as long.
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight.contiguous(), bias, "none", [], "")
    return F.linear(x, weight, bias)
