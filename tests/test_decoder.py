"""The transparent decoder against the same network put together from diffusers' blocks."""

import pytest
import torch
from reference import (
    RELEASED_ATTENDS,
    RELEASED_WIDTHS,
    SMALL_WIDTHS,
    ReferenceDecoder,
    random_state_dict,
    reference_encoder,
)

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.nets.decoder import TransparentDecoder

VARIANTS = {
    "small": {},
    "growing": {"widths": (8, 8, 16, 24, 24, 32, 8)},
    "Flux latent": {"latent_channels": 16},
    "attention elsewhere": {"attends": (False, False, True, False, True, False, False)},
    "no attention but in the middle": {"attends": (False,) * 7},
    "other numbers of layers": {"layers": 1},
    "fewer blocks": {"widths": SMALL_WIDTHS[:5], "attends": RELEASED_ATTENDS[2:]},
}


@pytest.mark.parametrize("sizes", VARIANTS.values(), ids=VARIANTS.keys())
def test_parity_with_diffusers(sizes):
    reference = ReferenceDecoder(**sizes)
    net = TransparentDecoder.from_state_dict(random_state_dict(reference))
    rgb = torch.rand(2, 3, 64, 128)
    latent = torch.randn(2, sizes.get("latent_channels", 4), 8, 16)
    with torch.no_grad():
        expected = reference(rgb, latent)
    assert expected.shape == (2, 4, 64, 128)
    torch.testing.assert_close(net(rgb, latent), expected, rtol=1e-4, atol=1e-5)


def test_the_released_file_has_538_tensors_with_104_million_parameters():
    with torch.device("meta"):
        released = ReferenceDecoder(RELEASED_WIDTHS).state_dict()
    net = TransparentDecoder.from_state_dict(released)
    assert {key: value.shape for key, value in net.state_dict().items()} == {
        key: value.shape for key, value in released.items()
    }
    assert len(released) == 538
    assert sum(value.numel() for value in net.parameters()) == pytest.approx(104.1e6, abs=0.05e6)


def test_holds_the_tensors_of_the_file_as_they_are():
    state_dict = {key: value.half() for key, value in random_state_dict(ReferenceDecoder()).items()}
    held = dict(TransparentDecoder.from_state_dict(state_dict).named_parameters())
    assert {key: value.data_ptr() for key, value in state_dict.items()} == {
        key: value.data_ptr() for key, value in held.items()
    }
    assert not any(value.requires_grad for value in held.values())


def test_the_latent_and_the_pixels_both_matter():
    net = TransparentDecoder.from_state_dict(random_state_dict(ReferenceDecoder()))
    rgb, latent = torch.rand(1, 3, 64, 64), torch.randn(1, 4, 8, 8)
    assert not torch.allclose(net(rgb, latent), net(rgb, latent + 1))
    assert not torch.allclose(net(rgb, latent), net(1 - rgb, latent))


def changed(**changes):
    state_dict = random_state_dict(ReferenceDecoder())
    state_dict.update(changes)
    return {key: value for key, value in state_dict.items() if value is not None}


MISFITS = {
    "missing": (lambda: changed(**{"conv_out.bias": None}), "conv_out.bias: found nothing, expected (4,)"),
    "too much": (lambda: changed(time=torch.zeros(3)), "time: found (3,), expected nothing"),
    "wrong shape": (
        lambda: changed(**{"conv_norm_out.weight": torch.zeros(9)}),
        "conv_norm_out.weight: found (9,), expected (8,)",
    ),
    "no latent": (lambda: changed(**{"latent_conv_in.weight": None}), "no tensor latent_conv_in.weight"),
    "odd widths": (lambda: {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(12, 3, 3, 3)}, "[12]"),
    "another network": (lambda: random_state_dict(reference_encoder(), prefix="blocks."), "down blocks [] wide"),
    "nothing": (dict, "down blocks [] wide"),
}


@pytest.mark.parametrize(("state_dict", "words"), MISFITS.values(), ids=MISFITS.keys())
def test_a_file_that_does_not_fit_is_named(state_dict, words):
    with pytest.raises(LayerDiffuseError) as error:
        TransparentDecoder.from_state_dict(state_dict())
    assert words in str(error.value)
