"""Files in number formats that people save: one precision without loss, or the tensor is named."""

from itertools import combinations

import pytest
import torch
from reference import ReferenceDecoder, random_state_dict

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.nets.decoder import TransparentDecoder
from lib_layerdiffuse.weights.precision import PRECISIONS, uniform

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
F8 = [kind for kind in PRECISIONS if kind.itemsize == 1]
INTEGERS = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
VALUES = torch.tensor([-1.5, 0, 0.25, 2])  # that every format has


def of(*kinds):
    return {str(kind): VALUES.to(kind) for kind in kinds}


@pytest.mark.parametrize(
    ("kinds", "precision"),
    [
        ([F16], F16),
        ([BF16], BF16),
        ([F32], F32),
        ([F64], F32),
        ([F16, F32], F32),
        ([F16, F64], F32),
        ([F16, BF16], F32),
        ([BF16, F32], F32),
        *(([kind], F16) for kind in F8),
        *(([kind, F16], F16) for kind in F8),
        *(([kind, BF16], F32) for kind in F8),
        (F8, F16),
    ],
    ids=str,
)
def test_one_precision_for_all(kinds, precision):
    converted = uniform(of(*kinds))
    assert {tensor.dtype for tensor in converted.values()} == {precision}
    assert all(torch.equal(tensor.float(), VALUES) for tensor in converted.values())


@pytest.mark.parametrize(("one", "other"), list(combinations(PRECISIONS, 2)), ids=str)
def test_no_number_is_lost(one, other):
    """All of one byte's formats, and the extremes of the others."""
    for kind, tensor in zip((one, other), uniform({"one": extremes(one), "other": extremes(other)}).values()):
        assert torch.equal(tensor.double(), extremes(kind).double())


def extremes(kind):
    if kind is F64:  # in what is kept of it
        return extremes(F32).double()
    if kind.itemsize == 1:
        every = torch.arange(256, dtype=torch.uint8)
        return every[every.view(kind).float().isfinite()].view(kind)
    limits = torch.finfo(kind)
    return torch.tensor([limits.min, limits.max, limits.tiny, limits.eps], dtype=kind)


@pytest.mark.parametrize("kind", [F16, BF16, F32])
def test_what_has_one_precision_is_not_copied(kind):
    tensors = of(kind) | {"other": VALUES.to(kind)}
    assert all(tensors[name] is tensor for name, tensor in uniform(tensors).items())


@pytest.mark.parametrize("kind", [*INTEGERS, torch.complex64], ids=str)
def test_what_is_no_floating_point_is_named(kind):
    with pytest.raises(LayerDiffuseError, match=f"its tensor {kind} holds {str(kind)[6:]}, where"):
        uniform(of(F16, kind))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", [F16, BF16, F32, F64, torch.float8_e5m2], ids=str)
def test_what_is_not_finite_is_named(kind, wrong):
    spoilt = torch.zeros(100, dtype=F32)
    spoilt[70] = wrong
    with pytest.raises(LayerDiffuseError, match="tensor spoilt holds NaN or infinity"):
        uniform(of(F16) | {"spoilt": spoilt.to(kind)})


@pytest.mark.parametrize("kind", [F16, BF16, F32], ids=str)
def test_the_largest_numbers_are_finite(kind):
    uniform({"large": torch.full((1000,), torch.finfo(kind).max, dtype=kind)})


def test_what_float32_cannot_hold_is_named():
    with pytest.raises(LayerDiffuseError, match="tensor far holds NaN or infinity"):
        uniform({"far": torch.tensor([1e300], dtype=F64)})


def test_nothing_and_empty_tensors():
    assert uniform({}) == {}
    assert uniform({"a": torch.empty(0, 3)})["a"].shape == (0, 3)


def test_a_decoder_in_eight_bits_decodes():
    """As the one that its numbers are, and with them in half precision."""
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in random_state_dict(ReferenceDecoder()).items()}
    net = TransparentDecoder.from_state_dict(uniform(small)).float()
    same = TransparentDecoder.from_state_dict({name: tensor.float() for name, tensor in small.items()})
    rgb, latent = torch.rand(1, 3, 64, 64), torch.randn(1, 4, 8, 8)
    torch.testing.assert_close(net(rgb, latent), same(rgb, latent))
