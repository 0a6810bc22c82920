"""The decoder in strips against the whole network, and against diffusers' blocks at the released widths."""

import sys
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from reference import RELEASED_WIDTHS, ReferenceDecoder, random_state_dict
from torch import nn
from torch.nn import functional as F

from lib_layerdiffuse import vae
from lib_layerdiffuse.nets import compiled, strips, threaded, winograd
from lib_layerdiffuse.nets.decoder import TransparentDecoder
from lib_layerdiffuse.nets.scratch import Blocks, Scratch
from lib_layerdiffuse.nets.strips import (
    FeatureMap,
    StripDecoder,
    convolve_as_product,
    joined,
    moments,
    normalisation,
    upsampling_weights,
)
from lib_layerdiffuse.nets.threaded import ThreadedDecoder

WIDTHS = (8, 8, 16, 16, 24, 24, 32)  # none of the levels alike, so that joined channels fall on both sides of a group


@pytest.fixture(scope="module")
def net():
    return TransparentDecoder.from_state_dict(random_state_dict(ReferenceDecoder(WIDTHS)))


def random_input(height=128, width=64, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rgb = torch.rand(batch, 3, height, width, generator=generator)
    return rgb, torch.randn(batch, 4, height // 8, width // 8, generator=generator)


@pytest.fixture(params=[StripDecoder, ThreadedDecoder])
def decoder_class(request):
    """Both; with three threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield request.param
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2**15, 2**30], ids=["four rows", "some rows", "all rows"])
def strip_bytes(request, monkeypatch):
    monkeypatch.setattr(strips, "STRIP_BYTES", request.param)
    monkeypatch.setattr(threaded, "STRIP_BYTES", request.param)


@pytest.fixture(params=[False, True], ids=["direct", "in tiles"])
def in_tiles(request, monkeypatch, decoder_class):
    if request.param:
        for module in (strips, threaded):
            monkeypatch.setattr(module, "WORTH_TILES", 1)
        monkeypatch.setattr(strips, "WORTH_KERNEL", 1)
        monkeypatch.setattr(strips, "WORTH_LARGE_TILES", 1)
        monkeypatch.setattr(threaded, "TILE_NUMBERS", 128)
    module, name = {StripDecoder: (winograd, "convolve"), ThreadedDecoder: (compiled, "into_tiles")}[decoder_class]
    convolve = Mock(wraps=getattr(module, name))
    monkeypatch.setattr(module, name, convolve)
    yield
    assert convolve.called == request.param


@pytest.fixture(scope="module", params=[1, 2])
def whole(request, net):
    """Pictures and latents of a batch, and what the whole network answers."""
    rgb, latent = random_input(batch=request.param)
    with torch.no_grad():
        return rgb, latent, net(rgb, latent)


@pytest.mark.usefixtures("strip_bytes", "in_tiles")
@torch.no_grad()
def test_strips_answer_as_the_whole_network(net, whole, decoder_class):
    rgb, latent, expected = whole
    torch.testing.assert_close(decoder_class(net)(rgb, latent), expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_strips_answer_as_diffusers_blocks(decoder_class, monkeypatch):
    monkeypatch.setattr(strips, "STRIP_BYTES", 2**14)
    monkeypatch.setattr(threaded, "STRIP_BYTES", 2**14)
    reference = ReferenceDecoder(WIDTHS)
    state_dict = random_state_dict(reference)
    rgb, latent = random_input(192, 64)
    answer = decoder_class(TransparentDecoder.from_state_dict(state_dict))(rgb, latent)
    torch.testing.assert_close(answer, reference(rgb, latent), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def released():
    """A network of the released widths, what it is given, and what diffusers' blocks answer."""
    reference = ReferenceDecoder(RELEASED_WIDTHS)
    net = TransparentDecoder.from_state_dict(random_state_dict(reference))
    rgb, latent = random_input(512, 256)
    with torch.no_grad():
        return net, rgb, latent, reference(rgb, latent)


@torch.no_grad()
def test_the_released_widths(released, decoder_class, monkeypatch):
    """Large enough for every way of computing: convolutions in tiles and direct ones, attention over 512 tokens."""
    turn = Mock(wraps=winograd.turn)
    monkeypatch.setattr(winograd, "turn", turn)
    net, rgb, latent, expected = released
    torch.testing.assert_close(decoder_class(net)(rgb, latent), expected, rtol=0, atol=1e-5)
    narrowest = min(call.args[0].shape[1] for call in turn.call_args_list)
    assert narrowest == (128 if decoder_class is StripDecoder else 32)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_threads_work_in_the_mode_of_their_caller(mode):
    with mode():
        net = TransparentDecoder.from_state_dict(random_state_dict(ReferenceDecoder(WIDTHS)))
        decoder, (rgb, latent) = ThreadedDecoder(net), random_input()
        for _ in range(2):
            torch.testing.assert_close(decoder(rgb, latent), net(rgb, latent), rtol=0, atol=2e-5)


@torch.no_grad()
def test_memory_is_all_given_back_and_used_for_the_next_picture(net, decoder_class):
    decoder = decoder_class(net)
    pieces = decoder._blocks._pieces
    kept: list[int] = []
    for _ in range(4):
        decoder(*random_input())
        assert not decoder._blocks._taken
        assert len(decoder._blocks._free) == len(pieces)
        # And perhaps one more, where threads happen to need more at once than for the picture before.
        assert [each.data_ptr() for each in pieces[: len(kept)]] == kept
        kept = [each.data_ptr() for each in pieces]


@torch.no_grad()
def test_the_next_picture_finds_nothing_of_the_last(net, decoder_class):
    decoder = decoder_class(net)
    first = decoder(*random_input(seed=1))
    kept = first.clone()
    second = decoder(*random_input(seed=2))
    assert torch.equal(first, kept)
    torch.testing.assert_close(second, net(*random_input(seed=2)), rtol=0, atol=2e-5)
    turned = random_input(192, 128, seed=3)
    torch.testing.assert_close(decoder(*turned), net(*turned), rtol=0, atol=2e-5)


@torch.no_grad()
def test_turned_kernels_lie_in_memory_that_the_next_layer_has_too(net, monkeypatch):
    for module, name in ((threaded, "WORTH_TILES"), (strips, "WORTH_KERNEL")):
        monkeypatch.setattr(module, name, 1)
    decoder = ThreadedDecoder(net)
    turn = Mock(wraps=winograd.turn)
    monkeypatch.setattr(winograd, "turn", turn)
    decoder(*random_input())
    kernels = {call.args[1].untyped_storage().data_ptr() for call in turn.call_args_list}
    assert kernels <= {piece.data_ptr() for piece in decoder._blocks._pieces}
    assert not decoder._blocks._taken


@torch.no_grad()
def test_memory_is_used_again_not_gathered(net, decoder_class):
    """By one thread; how much several need at once depends on how they meet."""
    torch.set_num_threads(1)
    decoder = decoder_class(net)
    decoder(*random_input())
    kept = [piece.data_ptr() for piece in decoder._blocks._pieces]
    for _ in range(3):
        decoder(*random_input())
        assert [piece.data_ptr() for piece in decoder._blocks._pieces] == kept
    torch.set_num_threads(3)


def rounded(net, precision):
    return TransparentDecoder.from_state_dict({key: value.to(precision) for key, value in net.state_dict().items()})


IN_FLOAT32 = partial(StripDecoder, precision=torch.float32)


@pytest.mark.parametrize(
    ("make", "precision"),
    [(IN_FLOAT32, torch.float16), (IN_FLOAT32, torch.bfloat16), (ThreadedDecoder, torch.float16)],
)
@torch.no_grad()
def test_half_precision_weights_with_maps_in_full_precision(net, make, precision):
    half = rounded(net, precision)
    rgb, latent = random_input()
    exact = net(rgb, latent)

    def error(answer):
        return (answer.float() - exact).square().mean().sqrt()

    answer = make(half)(rgb, latent)
    assert answer.dtype == torch.float32
    assert error(answer) < error(half(rgb, latent))  # which keeps its maps in half precision too


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_maps_may_be_in_half_precision(net, decoder_class, precision):
    rgb, latent = random_input()
    answer = decoder_class(rounded(net, precision))(rgb, latent)
    stays_half = decoder_class is StripDecoder and precision == torch.float16
    assert answer.dtype == (torch.float16 if stays_half else torch.float32)
    torch.testing.assert_close(answer.float(), net(rgb, latent), rtol=0, atol=0.1)


@torch.no_grad()
def test_all_in_bfloat16_is_nearer_than_torchs_own_way(released, monkeypatch):
    """Maps, projections and shortcuts too, by the kernels. How far torch is off depends on the processor."""
    net, *_ = released
    half, (rgb, latent) = rounded(net, torch.bfloat16), random_input(64, 128)
    exact = net(rgb, latent)
    kernels = {name: Mock(wraps=getattr(compiled, name)) for name in ("activate", "settle", "attend")}
    for name, each in kernels.items():
        monkeypatch.setattr(compiled, name, each)

    def error(answer):
        return (answer.float() - exact).square().mean().sqrt()

    answer = ThreadedDecoder(half)(rgb, latent)
    assert answer.dtype == torch.float32
    assert (answer != answer.bfloat16()).float().mean() > 0.9  # its last layer was not rounded
    assert error(answer) < 0.9 * error(half(rgb, latent))
    assert all(each.called for each in kernels.values())


@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_a_convolution_as_a_product_of_matrices(stride):
    conv = nn.Conv2d(5, 7, 3, stride)
    x = torch.randn(2, 5, 9, 13).contiguous(memory_format=torch.channels_last)
    answer = convolve_as_product(x, conv.weight, conv.bias, stride, Scratch(Blocks()))
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
    strips = [(0, 16), (16, 26), (26, 30)]
    found = joined(values, strips, torch.stack([moments(values[:, :, top:bottom]) for top, bottom in strips]))
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


@pytest.fixture
def no_whole_network(monkeypatch):
    monkeypatch.setattr(TransparentDecoder, "forward", None)


@pytest.mark.usefixtures("no_whole_network")
@pytest.mark.parametrize("worth", [1, 2**20])
def test_on_a_processor_the_decoder_works_in_strips_large_pictures_with_compiled_kernels(net, worth, monkeypatch):
    monkeypatch.setattr(vae, "WORTH_COMPILING", worth)
    attend = Mock(wraps=compiled.attend)
    monkeypatch.setattr(compiled, "attend", attend)
    rgba = vae.TransparentVAE(net).decode(*random_input(64, 64), passes=2)
    assert rgba.shape == (1, 4, 64, 64)
    assert attend.called == (worth == 1)


@pytest.mark.usefixtures("no_whole_network")
@pytest.mark.parametrize("error", [ImportError, SystemError])
def test_without_numba_the_decoder_answers_the_same(net, error, monkeypatch):
    monkeypatch.setattr(vae, "WORTH_COMPILING", 1)
    expected = vae.TransparentVAE(net).decode(*random_input(64, 64), passes=2)

    class Broken:
        def find_spec(self, name, path, target=None):
            if name == threaded.__name__:
                raise error("Numba needs NumPy 2.3 or less.")

    monkeypatch.delitem(sys.modules, threaded.__name__)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert vae.compiled_decoder() is None
    found = vae.TransparentVAE(net).decode(*random_input(64, 64), passes=2)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
