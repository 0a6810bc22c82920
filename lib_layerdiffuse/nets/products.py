"""Linear maps on a processor by oneDNN, which PyTorch brings for its convolutions.

PyTorch itself computes those of single precision by MKL there, which takes up to twice as long on AMD's processors; in
bfloat16 its own way to oneDNN takes a third more time for narrow maps (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# As PyTorch's own compiler calls it; it knows no gradients.
HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
PRECISIONS = [torch.float32]
if HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported():
    PRECISIONS.append(torch.bfloat16)


def _suits_onednn(x: Tensor) -> bool:
    return HAS_ONEDNN and x.device.type == "cpu" and x.dtype in PRECISIONS and not x.requires_grad


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, beside: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias + beside, [..., in] -> [..., out], of one precision on one device.

    All but x: without gradients.
    """
    if not _suits_onednn(x):
        return F.linear(x, weight, bias) if beside is None else beside + F.linear(x, weight, bias)
    # Of a view with gaps between its rows it would take a thousand times as long.
    x, weight = x.contiguous(), weight.contiguous()
    if beside is None:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, beside, weight, bias, "add")
