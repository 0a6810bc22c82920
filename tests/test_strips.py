"""The decoder in strips against the whole network, and against diffusers' blocks at the released widths."""

from unittest.mock import Mock

import pytest
import torch
from reference import RELEASED_WIDTHS, ReferenceDecoder, random_state_dict
from torch import nn
from torch.nn import functional as F

from lib_layerdiffuse import vae
from lib_layerdiffuse.nets import strips, winograd
from lib_layerdiffuse.nets.decoder import TransparentDecoder
from lib_layerdiffuse.nets.scratch import Scratch
from lib_layerdiffuse.nets.strips import (
    FeatureMap,
    Moments,
    StripDecoder,
    convolve_as_product,
    normalisation,
    upsampling_weights,
)

WIDTHS = (8, 8, 16, 16, 24, 24, 32)  # none of the levels alike, so that joined channels fall on both sides of a group


@pytest.fixture(scope="module")
def net():
    return TransparentDecoder.from_state_dict(random_state_dict(ReferenceDecoder(WIDTHS)))


def random_input(height=128, width=192, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rgb = torch.rand(batch, 3, height, width, generator=generator)
    return rgb, torch.randn(batch, 4, height // 8, width // 8, generator=generator)


@pytest.fixture(params=[1, 2**15, 2**30], ids=["four rows", "some rows", "all rows"])
def strip_bytes(request, monkeypatch):
    monkeypatch.setattr(strips, "STRIP_BYTES", request.param)


@pytest.fixture(params=[False, True], ids=["direct", "in tiles"])
def in_tiles(request, monkeypatch):
    if request.param:
        monkeypatch.setattr(strips, "WORTH_TILES", 1)
        monkeypatch.setattr(strips, "WORTH_LARGE_TILES", 1)
        monkeypatch.setattr(strips, "WORTH_KERNEL", 1)
    convolve = Mock(wraps=winograd.convolve)
    monkeypatch.setattr(winograd, "convolve", convolve)
    yield
    assert convolve.called == request.param


@pytest.mark.usefixtures("strip_bytes", "in_tiles")
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_strips_answer_as_the_whole_network(net, batch):
    rgb, latent = random_input(batch=batch)
    torch.testing.assert_close(StripDecoder(net)(rgb, latent), net(rgb, latent), rtol=0, atol=2e-5)


@torch.no_grad()
def test_strips_answer_as_diffusers_blocks(monkeypatch):
    monkeypatch.setattr(strips, "STRIP_BYTES", 2**14)
    reference = ReferenceDecoder(WIDTHS)
    state_dict = random_state_dict(reference)
    rgb, latent = random_input(192, 64)
    answer = StripDecoder(TransparentDecoder.from_state_dict(state_dict))(rgb, latent)
    torch.testing.assert_close(answer, reference(rgb, latent), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_released_widths(monkeypatch):
    """Large enough for every way of computing: convolutions in tiles and direct ones, attention over 512 tokens."""
    turned = Mock(wraps=winograd.turned)
    monkeypatch.setattr(winograd, "turned", turned)
    reference = ReferenceDecoder(RELEASED_WIDTHS)
    state_dict = random_state_dict(reference)
    rgb, latent = random_input(512, 256)
    answer = StripDecoder(TransparentDecoder.from_state_dict(state_dict))(rgb, latent)
    torch.testing.assert_close(answer, reference(rgb, latent), rtol=0, atol=1e-5)
    assert {(256, 768, 3, 3), (128, 128, 3, 3)} <= {call.args[0].shape for call in turned.call_args_list}


@torch.no_grad()
def test_the_largest_maps_are_kept_for_the_next_picture(net):
    decoder = StripDecoder(net)
    rgb, latent = random_input()
    decoder(rgb, latent)
    free = decoder._free[WIDTHS[0] * rgb[0, 0].numel()]
    kept = list(free)  # held here, so that fresh memory has other addresses
    decoder(rgb, latent)
    assert kept
    assert {each.data_ptr() for each in free} == {each.data_ptr() for each in kept}


@torch.no_grad()
def test_the_next_picture_finds_nothing_of_the_last(net):
    decoder = StripDecoder(net)
    first = decoder(*random_input(seed=1))
    kept = first.clone()
    second = decoder(*random_input(seed=2))
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, net(*random_input(seed=2)), rtol=0, atol=2e-5)
    turned = random_input(192, 128, seed=3)
    torch.testing.assert_close(decoder(*turned), net(*turned), rtol=0, atol=2e-5)


@torch.no_grad()
def test_memory_is_used_again_not_gathered(net):
    decoder = StripDecoder(net)
    decoder(*random_input())
    kept = sum(len(maps) * numbers for numbers, maps in decoder._free.items())
    for _ in range(3):
        decoder(*random_input())
    assert sum(len(maps) * numbers for numbers, maps in decoder._free.items()) == kept


@torch.no_grad()
def test_half_precision_weights_with_maps_in_full_precision(net):
    half = TransparentDecoder.from_state_dict({key: value.bfloat16() for key, value in net.state_dict().items()})
    rgb, latent = random_input()
    exact = net(rgb, latent)

    def error(answer):
        return (answer.float() - exact).square().mean().sqrt()

    answer = StripDecoder(half, precision=torch.float32)(rgb, latent)
    assert answer.dtype == torch.float32
    assert error(answer) < error(half(rgb, latent))  # which keeps its maps in half precision too


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_maps_may_be_in_half_precision(net, precision):
    half = TransparentDecoder.from_state_dict({key: value.to(precision) for key, value in net.state_dict().items()})
    rgb, latent = random_input()
    answer = StripDecoder(half)(rgb, latent)
    assert answer.dtype == precision
    torch.testing.assert_close(answer.float(), net(rgb, latent), rtol=0, atol=0.1)


@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_a_convolution_as_a_product_of_matrices(stride):
    conv = nn.Conv2d(5, 7, 3, stride)
    x = torch.randn(2, 5, 9, 13).contiguous(memory_format=torch.channels_last)
    answer = convolve_as_product(x, conv.weight, conv.bias, stride, Scratch())
    assert answer.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(answer, conv(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_upsampling_weights_are_a_convolution_of_the_enlarged_picture():
    conv = nn.Conv2d(3, 5, 3, padding=1, bias=False).double()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    expected = conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    four = F.conv2d(F.pad(x, (1, 1, 1, 1)), upsampling_weights(conv.weight.float()).double())
    for index, part in enumerate(four.chunk(4, dim=1)):
        row, column = divmod(index, 2)
        torch.testing.assert_close(
            part[:, :, row : row + 4, column : column + 6], expected[:, :, row::2, column::2], rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("offset", [0, 1000], ids=["around zero", "far from zero"])
def test_moments_of_strips_are_those_of_the_whole(offset):
    values = torch.randn(2, 3, 30, 7) * torch.linspace(0.5, 2, 30)[:, None] + offset
    moments = Moments()
    for strip in values.split([16, 10, 4], dim=2):
        moments.add(strip.contiguous(memory_format=torch.channels_last))
    found = moments.of_all(values)
    torch.testing.assert_close(found.mean, values.mean((2, 3)))
    torch.testing.assert_close(found.variance, values.double().var((2, 3), correction=0).float(), rtol=1e-4, atol=0)


def test_normalisation_of_joined_sources_is_group_norm():
    norm = nn.GroupNorm(4, 24)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    values = torch.randn(2, 24, 8, 8) * 3 + torch.linspace(-4, 4, 24)[:, None, None]
    parts = values.split([16, 8], dim=1)
    sources = [FeatureMap(x, x.mean((2, 3)), x.var((2, 3), correction=0)) for x in parts]
    normalised = [x * scale + shift for x, (scale, shift) in zip(parts, normalisation(sources, norm))]
    torch.testing.assert_close(torch.cat(normalised, dim=1), norm(values), rtol=1e-5, atol=1e-5)


class Crowded(TransparentDecoder):
    """Its whole form never finds the memory."""

    def forward(self, rgb, latent):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


@torch.no_grad()
def test_where_not_one_picture_fits_the_maps_move_to_main_memory(net):
    """As on a GPU: all rests on the processor here, but in the form and the order in which a GPU would try."""
    crowded = Crowded.from_state_dict(net.state_dict())
    network = vae.InParts(crowded, 4, smaller=StripDecoder(crowded, storage=torch.device("cpu")))
    rgb, latent = random_input(batch=2)
    torch.testing.assert_close(network(rgb, latent), net(rgb, latent), rtol=0, atol=2e-5)
    assert isinstance(network.net, StripDecoder)


def test_on_a_processor_the_decoder_works_in_strips(net, monkeypatch):
    monkeypatch.setattr(TransparentDecoder, "forward", None)
    rgba = vae.TransparentVAE(net).decode(*random_input(64, 64), passes=2)
    assert rgba.shape == (1, 4, 64, 64)
