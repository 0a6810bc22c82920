"""The latent-offset encoder against the same layers written out."""

import pytest
import torch
from reference import ReferenceDecoder, random_state_dict, reference_encoder

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.nets.encoder import TransparentEncoder

VARIANTS = {
    "small": (4, 8, 8, 8, 8, 8, 8, 8, 8, 4),
    "Flux": (4, 8, 8, 16, 16, 8, 8, 12, 12, 16),
    "released": (4, 32, 32, 64, 64, 128, 128, 256, 256, 4),
}


@pytest.mark.parametrize("widths", VARIANTS.values(), ids=VARIANTS.keys())
def test_parity(widths):
    reference = reference_encoder(widths)
    net = TransparentEncoder.from_state_dict(random_state_dict(reference, prefix="blocks."))
    argb = torch.rand(2, 4, 40, 72)
    with torch.no_grad():
        expected = reference(argb)
    assert expected.shape == (2, widths[-1], 5, 9)
    torch.testing.assert_close(net(argb), expected)


def test_the_released_file_has_18_tensors_of_2_37_megabytes():
    state_dict = random_state_dict(reference_encoder(VARIANTS["released"]), prefix="blocks.")
    net = TransparentEncoder.from_state_dict({key: value.half() for key, value in state_dict.items()})
    assert len(net.state_dict()) == 18
    assert sum(value.numel() * value.itemsize for value in net.parameters()) == pytest.approx(2.37e6, abs=0.01e6)


MISFITS = {
    "another network": (lambda: random_state_dict(ReferenceDecoder()), "no tensor blocks.0.weight among its 530"),
    "nothing": (dict, "no tensor blocks.0.weight among its 0"),
    "cut off": (lambda: {"blocks.0.weight": torch.zeros(8, 4, 3, 3)}, "blocks.0.bias: found nothing, expected (8,)"),
}


@pytest.mark.parametrize(("state_dict", "words"), MISFITS.values(), ids=MISFITS.keys())
def test_a_file_that_does_not_fit_is_named(state_dict, words):
    with pytest.raises(LayerDiffuseError) as error:
        TransparentEncoder.from_state_dict(state_dict())
    assert words in str(error.value)
