"""Compiled kernels against torch's operations."""

import pytest
import torch
from numba import njit
from torch.nn import functional as F

from lib_layerdiffuse.nets import compiled, winograd
from lib_layerdiffuse.nets.attention import compiled_attention
from lib_layerdiffuse.nets.scratch import Blocks, Scratch
from lib_layerdiffuse.nets.threaded import numbers


def activated(x, scale, shift, top, rows):
    """`compiled.activate` of [H, W, C] into channels from the third vector on of a map that is five wide."""
    offset, width = 2 * compiled.LANES, x.shape[1] + 2
    answer = torch.full((rows, width, 5 * compiled.LANES), 7, dtype=x.dtype)
    compiled.activate(numbers(x), scale.numpy(), shift.numpy(), top, offset, numbers(answer))
    within = slice(offset, offset + x.shape[2])
    assert (answer[..., : within.start] == 7).all()
    assert (answer[..., within.stop :] == 7).all()
    return answer[..., within]


def test_silu_over_all_numbers():
    x = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([0.0, 1e-30, 1e30, -1e30, torch.inf])])
    x = F.pad(x, (0, -len(x) % compiled.LANES))
    rows = x.view(1, -1, compiled.LANES)
    ones = torch.ones(compiled.LANES)
    found = activated(rows, ones, 0 * ones, 0, 1)[:, 1:-1].flatten()
    torch.testing.assert_close(found, F.silu(x), rtol=1e-6, atol=2e-8)


@njit
def apply_negative_exp2(x):
    for i in range(0, len(x), compiled.LANES):
        compiled.store(x, i, compiled.negative_exp2(compiled.load(x, i) + compiled.BIAS))


def test_powers_of_two_for_attention():
    x = torch.linspace(-126, 126, 2**16)
    found = x.clone()
    apply_negative_exp2(found.numpy())
    torch.testing.assert_close(found.double(), -(2 ** x.double()), rtol=3e-5, atol=0)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top", [-1, 3])
def test_reading_normalises_activates_and_rounds(precision, top):
    x, (scale, shift) = torch.randn(6, 10, 32).to(precision), torch.randn(2, 32)
    x[4, 2, 5] = torch.nan
    exact = activated(x.float(), scale, shift, top, 5)
    expected = F.pad(F.silu(x.float() * scale + shift), (0, 0, 1, 1, 1, 5))[top + 1 : top + 6]
    torch.testing.assert_close(exact, expected, equal_nan=True)
    found = activated(x, scale, shift, top, 5)
    torch.testing.assert_close(found, exact.to(precision), rtol=0, atol=0, equal_nan=True)


def test_rounding_is_to_the_nearest_and_what_is_no_number_stays_none():
    bits = [0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF, 0x7F800001]
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    x = F.pad(torch.cat([x, -x]), (0, -2 * len(x) % compiled.LANES)).view(1, -1, compiled.LANES)
    stored = torch.empty(x.shape, dtype=torch.bfloat16)
    copy_rounded(x.numpy(), numbers(stored))
    torch.testing.assert_close(stored, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@njit
def copy_rounded(source, target):
    for i in range(source.shape[1]):
        compiled.store(target[0, i], 0, compiled.load(source[0, i], 0))


@pytest.mark.parametrize("queries", [1, 2, 7])
@pytest.mark.parametrize("keys", [1, 4, 63, 64, 66, 1100])  # up to 64 at once, four by four
def test_attention_is_torchs(queries, keys, monkeypatch):
    q, k, v = torch.randn(3, 8, queries), torch.randn(3, 8, keys), torch.randn(3, 8, keys)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k + 1000, v))).transpose(1, 2)
    expected_exactly = F.scaled_dot_product_attention(*(x.transpose(1, 2).double() for x in (q, k, v))).transpose(1, 2)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # not by falling back
    mixed = torch.empty_like(q)
    compiled_attention(q, k, v, mixed, compiled.attend)
    torch.testing.assert_close(mixed, expected_exactly.float(), rtol=0, atol=5e-5)
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
@pytest.mark.parametrize(("width_in", "width_out"), [(16, 48), (1040, 16)])
def test_tiles_are_a_convolution_of_the_activated_map(height, width, top, bottom, first, count, width_in, width_out):
    x, scale, shift = torch.randn(height, width, width_in), torch.randn(width_in), torch.randn(width_in)
    weights, bias = torch.randn(width_out, width_in, 3, 3) / (9 * width_in) ** 0.5, torch.randn(width_out)
    down = -(-(bottom - top) // winograd.TILE)
    factors = torch.empty(winograd.POINTS, down * count, width_in)
    compiled.into_tiles(x.numpy(), scale.numpy(), shift.numpy(), top, first, down, count, factors.flatten(1).numpy())
    products = torch.bmm(factors, winograd.turned(weights, Scratch(Blocks())))
    found = torch.full((bottom - top, width, width_out), torch.nan)
    compiled.out_of_tiles(products.flatten(1).numpy(), bias.numpy(), first, count, found.numpy())

    expected = F.conv2d(F.silu(x * scale + shift).permute(2, 0, 1)[None], weights, bias, padding=1)[0].permute(1, 2, 0)
    columns = slice(first * winograd.TILE, (first + count) * winograd.TILE)
    torch.testing.assert_close(found[:, columns], expected[top:bottom, columns], rtol=0, atol=1e-4)
    assert found[:, : columns.start].isnan().all()
    assert found[:, columns.stop :].isnan().all()


@pytest.mark.parametrize("level", [0, 1000], ids=["around zero", "far from zero"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adds", [False, True], ids=["alone", "with more"])
def test_settling_copies_adds_and_measures(level, precision, adds):
    source = (torch.randn(9, 40, 48) * torch.linspace(0.5, 2, 48) + level).to(precision)
    beside = torch.randn(9, 40, 80 if adds else 0).to(precision)[..., 16:64]
    target, moments = torch.zeros(9, 40, 80, dtype=precision), torch.zeros(2, 80, dtype=torch.float64)
    compiled.settle(numbers(source), numbers(beside), numbers(target), 16, moments.numpy())
    answer = source.float() + beside.float() if adds else source
    assert torch.equal(target[..., 16:64], answer.to(precision))
    assert not target[..., :16].any()
    assert not target[..., 64:].any()
    torch.testing.assert_close(moments[0, 16:64], answer.double().mean((0, 1)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments[1, 16:64], answer.double().var((0, 1), correction=0), rtol=1e-4, atol=0)


def test_where_no_folder_may_be_written_to_kernels_are_compiled_all_the_same(monkeypatch):
    def njit(signature, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return lambda function: (function, signature, options)

    monkeypatch.setattr(compiled, "njit", njit)
    function, signature, options = compiled.kernel("void(f4)")(max)
    assert (function, signature) == (max, "void(f4)")
    assert options["nogil"]
