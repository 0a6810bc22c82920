"""Linear maps by whoever is fastest, against PyTorch's own."""

import platform
from unittest.mock import Mock

import pytest
import torch
from torch.nn import functional as F

from lib_layerdiffuse.nets import products

TOLERANCE = {torch.float32: {}, torch.bfloat16: {"rtol": 0.01, "atol": 0.02}}


@pytest.mark.parametrize("has_onednn", [products.HAS_ONEDNN, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 6), (2, 5, 6), (2, 0, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_numbers_of_a_linear_map(monkeypatch, dtype, shape, has_bias, has_onednn):
    monkeypatch.setattr(products, "HAS_ONEDNN", has_onednn)
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(4, 6, dtype=dtype)
    bias = torch.randn(4, dtype=dtype) if has_bias else None
    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(products.linear(x, weight, bias), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("has_onednn", [products.HAS_ONEDNN, False])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("rows", [slice(None), slice(1, 3)], ids=["all rows", "some rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pointwise_convolution_is_added_in_place(monkeypatch, dtype, rows, has_bias, has_onednn):
    monkeypatch.setattr(products, "HAS_ONEDNN", has_onednn)
    x, y = (torch.randn(2, 4, 5, width, dtype=dtype).permute(0, 3, 1, 2)[:, :, rows] for width in (6, 3))
    y = y.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(3, 12, 1, 1, dtype=dtype)[:, :6]
    bias = torch.randn(3, dtype=dtype) if has_bias else None
    expected, before = y + F.conv2d(x, weight, bias), y.data_ptr()
    products.add_pointwise(y, x, weight, bias)
    torch.testing.assert_close(y, expected, **TOLERANCE[dtype])
    assert y.data_ptr() == before


def test_views_of_larger_tensors():
    x, weight = torch.randn(3, 2, 12)[..., ::2].transpose(0, 1), torch.randn(6, 4).T
    torch.testing.assert_close(products.linear(x, weight), F.linear(x, weight))


@pytest.mark.skipif(not products.HAS_ONEDNN, reason="no oneDNN")
def test_onednn_gets_no_gaps(monkeypatch):
    """It takes them, and a thousand times as long."""
    onednn = Mock(wraps=torch.ops.mkldnn._linear_pointwise)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", onednn)
    products.linear(torch.randn(3, 12)[:, :6], torch.randn(4, 12)[:, :6])
    x, weight, *_ = onednn.call_args.args
    assert x.is_contiguous()
    assert weight.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_stay(dtype):
    x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((3, 6), (4, 6), (4,)))
    assert products.linear(x, weight, bias).equal(F.linear(x, weight, bias))


def test_gradients_reach_the_input():
    x, weight = torch.randn(3, 6, requires_grad=True), torch.randn(4, 6)
    products.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, 6))


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="where every PyTorch is built with oneDNN")
def test_onednn_is_found():
    """Were the operation renamed, nothing else would tell."""
    assert products.HAS_ONEDNN
