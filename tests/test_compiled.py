"""Compiled kernels against torch's operations."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lib_layerdiffuse.nets import compiled, winograd
from lib_layerdiffuse.nets.attention import compiled_attention
from lib_layerdiffuse.nets.scratch import Scratch


def test_silu_over_all_numbers():
    x = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([0.0, 1e-30, 1e30, -1e30, torch.inf])])
    found = torch.tensor([compiled.silu(np.float32(each)) for each in x])
    torch.testing.assert_close(found, F.silu(x), rtol=1e-6, atol=2e-8)
    assert np.isnan(compiled.silu(np.float32(np.nan)))


@pytest.mark.parametrize("queries", [1, 2, 7])
@pytest.mark.parametrize("keys", [1, 40, 513, 1100])  # up to 512 at once
def test_attention_is_torchs(queries, keys, monkeypatch):
    q, k, v = torch.randn(3, 8, queries), torch.randn(3, 8, keys), torch.randn(3, 8, keys)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k + 1000, v))).transpose(1, 2)
    expected_exactly = F.scaled_dot_product_attention(*(x.transpose(1, 2).double() for x in (q, k, v))).transpose(1, 2)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # not by falling back
    mixed = torch.empty_like(q)
    compiled_attention(q, k, v, mixed, compiled.attend)
    torch.testing.assert_close(mixed, expected_exactly.float(), rtol=0, atol=2e-6)
    compiled_attention(q, k + 1000, v, mixed, compiled.attend)  # what all keys share changes nothing
    torch.testing.assert_close(mixed, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize("strength", [300.0, torch.nan])
def test_attention_beyond_float32s_exponents_is_torchs(strength):
    q, k, v = torch.randn(3, 2, 8, 30)
    mixed = torch.empty_like(q)
    compiled_attention(q * strength, k * 300, v, mixed, compiled.attend)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q * strength, k * 300, v)))
    torch.testing.assert_close(mixed, expected.transpose(1, 2), rtol=0, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize(
    ("height", "width", "top", "bottom", "first", "count"),
    [
        (16, 24, 0, 16, 0, 6),  # the whole picture
        (16, 24, 4, 12, 2, 3),  # a piece within
        (13, 22, 8, 13, 3, 3),  # sides that do not end with a tile
    ],
)
@pytest.mark.parametrize(("width_in", "width_out"), [(5, 7), (600, 3)])
def test_tiles_are_a_convolution_of_the_activated_map(height, width, top, bottom, first, count, width_in, width_out):
    x, scale, shift = torch.randn(height, width, width_in), torch.randn(width_in), torch.randn(width_in)
    weights, bias = torch.randn(width_out, width_in, 3, 3) / (9 * width_in) ** 0.5, torch.randn(width_out)
    down = -(-(bottom - top) // winograd.TILE)
    factors = torch.empty(winograd.POINTS, down * count, width_in)
    compiled.into_tiles(x.numpy(), scale.numpy(), shift.numpy(), top, first, down, count, factors.flatten(1).numpy())
    products = torch.bmm(factors, winograd.turned(weights, Scratch()))
    found = torch.full((bottom - top, width, width_out), torch.nan)
    compiled.out_of_tiles(products.flatten(1).numpy(), bias.numpy(), first, count, found.numpy())

    expected = F.conv2d(F.silu(x * scale + shift).permute(2, 0, 1)[None], weights, bias, padding=1)[0].permute(1, 2, 0)
    columns = slice(first * winograd.TILE, (first + count) * winograd.TILE)
    torch.testing.assert_close(found[:, columns], expected[top:bottom, columns], rtol=0, atol=1e-4)
    assert found[:, : columns.start].isnan().all()
    assert found[:, columns.stop :].isnan().all()


@pytest.mark.parametrize("offset", [0, 1000], ids=["around zero", "far from zero"])
def test_settling_copies_and_measures(offset):
    source = torch.randn(9, 40, 5) * torch.linspace(0.5, 2, 5) + offset
    target, moments = torch.zeros(9, 40, 8), torch.zeros(2, 8, dtype=torch.float64)
    compiled.settle(source.numpy(), target.numpy(), 2, moments.numpy())
    assert torch.equal(target[..., 2:7], source)
    assert not target[..., :2].any()
    assert not target[..., 7:].any()
    torch.testing.assert_close(moments[0, 2:7], source.double().mean((0, 1)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments[1, 2:7], source.double().var((0, 1), correction=0), rtol=1e-4, atol=0)


def test_where_no_folder_may_be_written_to_kernels_are_compiled_all_the_same(monkeypatch):
    def njit(signature, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: (function, signature, options)

    monkeypatch.setattr(compiled, "njit", njit)
    function, signature, options = compiled.kernel("void(f4)", {"contract"})(max)
    assert (function, signature) == (max, "void(f4)")
    assert options["nogil"]
