"""Decode and encode around tiny random networks, against the formulas written out plainly in numpy."""

import sys

import numpy as np
import pytest
import torch
from reference import ReferenceDecoder, random_state_dict, reference_encoder
from torch import nn

from lib_layerdiffuse import vae
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.rgba import pad_colors
from lib_layerdiffuse.nets.decoder import TransparentDecoder
from lib_layerdiffuse.nets.encoder import TransparentEncoder
from lib_layerdiffuse.vae import ORIENTATIONS, TransparentVAE, in_groups


@pytest.fixture(scope="module")
def decoder():
    state_dict = random_state_dict(ReferenceDecoder(layers=1))
    state_dict["conv_out.weight"] *= 0.4
    state_dict["conv_out.bias"] += 0.5  # so that most values are within [0, 1], and some are not
    return TransparentDecoder.from_state_dict(state_dict)


@pytest.fixture(scope="module")
def encoder():
    return TransparentEncoder.from_state_dict(random_state_dict(reference_encoder(), prefix="blocks."))


def random_input(height, width, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rgb = torch.rand(batch, 3, height, width, generator=generator)
    return rgb, torch.randn(batch, 4, height // 8, width // 8, generator=generator)


def padded(picture, multiple):
    height, width = picture.shape[2:]
    return np.pad(picture, ((0, 0), (0, 0), (0, -height % multiple), (0, -width % multiple)), mode="edge")


def plain_decode(net, rgb, latent, passes):
    """The method step by step, one picture after the other: pad, turn, decode, clip, turn back, 4th smallest, crop."""
    pictures = []
    for pixels, cells in zip(rgb.numpy()[:, None], latent.numpy()[:, None]):
        pixels, cells = padded(pixels, 64), padded(cells, 8)
        answers = []
        for index in range(passes):
            flipped, turns = divmod(index, 4)
            turned = [np.rot90(x[..., ::-1] if flipped else x, turns, axes=(2, 3)).copy() for x in (pixels, cells)]
            raw = net(*map(torch.from_numpy, turned)).numpy()
            back = np.rot90(np.clip(raw, 0, 1), -turns, axes=(2, 3))
            answers.append(back[..., ::-1] if flipped else back)
        argb = np.sort(answers, axis=0)[(passes - 1) // 2]
        pictures.append(argb[:, [1, 2, 3, 0], : rgb.shape[2], : rgb.shape[3]])
    return torch.from_numpy(np.concatenate(pictures))


@pytest.mark.parametrize(
    ("height", "width", "passes"),
    [(64, 64, 1), (64, 64, 2), (64, 64, 4), (64, 64, 8), (64, 128, 8), (72, 136, 8), (104, 40, 2)],
)
def test_decode_follows_the_formulas(decoder, height, width, passes):
    rgb, latent = random_input(height, width)
    rgba = TransparentVAE(decoder).decode(rgb, latent, passes)
    assert rgba.shape == (1, 4, height, width)
    assert rgba.dtype == torch.float32
    assert 0 <= rgba.min() < rgba.max() <= 1
    torch.testing.assert_close(rgba, plain_decode(decoder, rgb, latent, passes), rtol=1e-4, atol=1e-5)


def test_orientations_are_eight_different_ones_and_undone():
    picture = torch.arange(6.0).view(1, 1, 2, 3)
    turned = [orientation.apply(picture) for orientation in ORIENTATIONS]
    assert len({(tuple(x.shape), tuple(x.flatten().tolist())) for x in turned}) == 8
    for orientation, each in zip(ORIENTATIONS, turned):
        assert torch.equal(orientation.undo(each), picture)
    flipped_then_turned = ORIENTATIONS[5].apply(picture)
    assert flipped_then_turned.tolist() == [[[[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]]]


@pytest.mark.parametrize("size", [1, 3, 4, 8])
def test_groups_hold_every_orientation_once_and_one_shape_each(size):
    groups = list(in_groups(ORIENTATIONS, square=False, size=size))
    assert sorted(each for group in groups for each in group) == sorted(ORIENTATIONS)
    assert all(0 < len(group) <= size for group in groups)
    assert all(len({orientation.quarter_turns % 2 for orientation in group}) == 1 for group in groups)
    assert len(list(in_groups(ORIENTATIONS, square=True, size=size))) == -(-8 // size)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 128)])
@pytest.mark.parametrize("passes", [1, 2, 8])
def test_orientations_together_answer_as_one_after_the_other(decoder, height, width, passes):
    rgb, latent = random_input(height, width, batch=2)
    roomy = Cramped(decoder, 16, None)
    rgba = TransparentVAE(roomy).decode(rgb, latent, passes)
    assert len(roomy.sizes) == (1 if height == width else min(2, passes))
    torch.testing.assert_close(rgba, plain_decode(decoder, rgb, latent, passes), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("side", "free", "expected"),
    [
        (512, sys.maxsize, 4),  # as many as make BATCH_PIXELS
        (2048, sys.maxsize, 1),
        (512, 2 * 600 * 512 * 512 * 4, 2),
        (512, 0, 1),  # it must be tried
    ],
)
def test_as_many_pictures_at_once_as_there_is_memory_for(monkeypatch, side, free, expected):
    monkeypatch.setattr(vae, "free_memory", lambda device: free)
    assert vae.pictures_at_once(torch.empty(1, 3, side, side, device="meta"), torch.zeros(1)) == expected


def test_where_torch_cannot_tell_how_much_memory_there_is_it_is_a_number_all_the_same():
    """Shares of it are too, which those of infinity are not."""
    assert vae.free_memory(torch.device("mps")) // 2**40 > 2**20


def test_every_picture_of_a_batch_comes_out_as_it_does_alone(decoder):
    vae = TransparentVAE(decoder)
    rgb, latent = random_input(64, 72, batch=3)
    together = vae.decode(rgb, latent)
    for index in range(3):
        alone = vae.decode(rgb[index : index + 1], latent[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-5, atol=1e-6)


def test_half_precision_network_answers_in_float32():
    state_dict = {key: value.bfloat16() for key, value in random_state_dict(ReferenceDecoder(layers=1)).items()}
    rgba = TransparentVAE(TransparentDecoder.from_state_dict(state_dict)).decode(*random_input(64, 72))
    assert rgba.dtype == torch.float32
    assert rgba.isfinite().all()


def test_half_precision_input_is_decoded_too(decoder):
    rgb, latent = random_input(64, 72)
    vae = TransparentVAE(decoder)
    expected = vae.decode(rgb.half().float(), latent.half().float())
    assert torch.equal(vae.decode(rgb.half(), latent.half()), expected)


@pytest.mark.parametrize("passes", [0, 3, 16])
def test_other_numbers_of_passes_are_refused(decoder, passes):
    with pytest.raises(ValueError, match=str(passes)):
        TransparentVAE(decoder).decode(*random_input(64, 64), passes=passes)


@pytest.mark.parametrize("cells", [(1, 4, 8, 9), (1, 4, 16, 8), (2, 4, 8, 8)])
def test_a_latent_that_is_not_the_pictures_is_refused(decoder, cells):
    with pytest.raises(LayerDiffuseError, match="64×64.*" + f"{cells[3]}×{cells[2]}"):
        TransparentVAE(decoder).decode(torch.rand(1, 3, 64, 64), torch.zeros(cells))


def test_a_picture_that_is_no_multiple_of_eight_is_refused(decoder):
    with pytest.raises(LayerDiffuseError, match="68×64"):
        TransparentVAE(decoder).decode(torch.rand(1, 3, 64, 68), torch.zeros(1, 4, 8, 8))


def test_on_pass_hears_of_every_pass(decoder):
    heard = []
    TransparentVAE(decoder).decode(*random_input(64, 64), passes=4, on_pass=lambda *told: not heard.append(told))
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_on_pass_stops_and_the_median_is_over_those_done(decoder, stop_after):
    rgb, latent = random_input(64, 64)
    rgba = TransparentVAE(decoder).decode(rgb, latent, on_pass=lambda done, total: done < stop_after)
    expected = plain_decode(decoder, rgb, latent, stop_after)
    torch.testing.assert_close(rgba, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8])
@pytest.mark.parametrize("ties", [False, True])
def test_the_lower_median_is_torchs_to_the_bit(count, ties):
    answers = torch.randint(3, (count, 2, 4, 5, 7)).float() if ties else torch.rand(count, 2, 4, 5, 7)
    assert torch.equal(vae.lower_median(answers.clone()), answers.median(dim=0).values)


@pytest.mark.parametrize("index", range(8))
def test_the_lower_median_passes_on_what_is_no_number(index):
    answers = torch.rand(8, 1, 4, 2, 2)
    answers[index] = torch.nan
    assert vae.lower_median(answers).isnan().all()


class Crowded(TransparentDecoder):
    """Its device never has the memory."""

    def forward(self, rgb, latent):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


def test_where_not_one_picture_fits_the_processor_decodes(decoder):
    """As on a GPU: all rests on the processor here, but in the form and the order in which a GPU would try."""
    crowded = Crowded.from_state_dict(decoder.state_dict())
    network = vae.InParts(crowded, 4, smaller=vae.on_processor(crowded))
    rgb, latent = random_input(64, 128, batch=2)
    with torch.no_grad():
        torch.testing.assert_close(network(rgb, latent), decoder(rgb, latent), rtol=0, atol=2e-5)


OUT_OF_MEMORY_ERRORS = {
    "CUDA": torch.cuda.OutOfMemoryError("CUDA out of memory."),
    "CPU": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."),
    "CPU of Windows": RuntimeError(
        "[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes."
    ),
    "MPS": RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)."),
    "MPS at once": RuntimeError("Invalid buffer size: 19.38 GB"),
    "DirectML": RuntimeError("Could not allocate tensor with 4 bytes. There is not enough GPU video memory available!"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
}


class Cramped(nn.Module):
    """A network on a device that holds only `room` pictures at a time."""

    def __init__(self, net, room, error):
        super().__init__()
        self.net, self.room, self.error = net, room, error
        self.sizes = []

    def forward(self, *batches):
        self.sizes.append(len(batches[0]))
        if len(batches[0]) > self.room:
            raise self.error
        return self.net(*batches)


@pytest.mark.parametrize("error", OUT_OF_MEMORY_ERRORS.values(), ids=OUT_OF_MEMORY_ERRORS.keys())
def test_out_of_memory_halves_the_batch_until_it_fits(decoder, error):
    rgb, latent = random_input(64, 64, batch=5)
    cramped = Cramped(decoder, 2, error)
    rgba = TransparentVAE(cramped).decode(rgb, latent, passes=2)
    assert cramped.sizes == [10, 5, 3, 2, 2, 2, 2, 2]  # two orientations of five pictures
    torch.testing.assert_close(rgba, TransparentVAE(decoder).decode(rgb, latent, passes=2), rtol=1e-5, atol=1e-6)


def test_out_of_memory_is_passed_on_where_not_even_one_picture_fits(decoder):
    cramped = Cramped(decoder, 0, OUT_OF_MEMORY_ERRORS["CUDA"])
    with pytest.raises(torch.cuda.OutOfMemoryError):
        TransparentVAE(cramped).decode(*random_input(64, 64, batch=4), passes=1)
    assert cramped.sizes == [4, 2, 1]


def test_other_errors_are_passed_on_at_once(decoder):
    cramped = Cramped(decoder, 1, RuntimeError("expected scalar type Half but found Float"))
    with pytest.raises(RuntimeError, match="scalar type"):
        TransparentVAE(cramped).decode(*random_input(64, 64, batch=4), passes=1)
    assert cramped.sizes == [4]


def test_encode_is_300_times_the_networks_answer_to_padded_colors(decoder, encoder):
    rgba = torch.rand(2, 4, 40, 72)
    rgba[:, 3, :, 30:] = 0
    offset = TransparentVAE(decoder, encoder).encode(rgba)
    assert offset.shape == (2, 4, 5, 9)
    assert offset.dtype == torch.float32
    expected = 300 * encoder(torch.cat([rgba[:, 3:], pad_colors(rgba)], dim=1))
    torch.testing.assert_close(offset, expected)


def test_encode_does_not_see_colors_under_full_transparency(decoder, encoder):
    rgba = torch.rand(1, 4, 40, 40)
    rgba[:, 3, :, 20:] = 0
    other = rgba.clone()
    other[:, :3, :, 20:] = 1
    vae = TransparentVAE(decoder, encoder)
    assert torch.equal(vae.encode(rgba), vae.encode(other))


def test_encode_goes_on_in_parts_when_out_of_memory(decoder, encoder):
    rgba = torch.rand(3, 4, 16, 16)
    cramped = Cramped(encoder, 1, OUT_OF_MEMORY_ERRORS["CUDA"])
    expected = TransparentVAE(decoder, encoder).encode(rgba)
    torch.testing.assert_close(TransparentVAE(decoder, cramped).encode(rgba), expected)
    assert cramped.sizes == [3, 2, 1, 1, 1]


def test_encode_refuses_sizes_that_eight_does_not_divide(decoder, encoder):
    with pytest.raises(LayerDiffuseError, match="44×40"):
        TransparentVAE(decoder, encoder).encode(torch.rand(1, 4, 40, 44))


def test_encode_needs_an_encoder(decoder):
    with pytest.raises(LayerDiffuseError, match="encoder is missing"):
        TransparentVAE(decoder).encode(torch.rand(1, 4, 40, 40))


NO_NUMBERS = pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])


@NO_NUMBERS
@pytest.mark.parametrize(("wrong", "flag"), [(0, "--vae-in-fp32"), (1, "--unet-in-bf16")], ids=["picture", "latent"])
def test_an_input_with_a_value_that_is_no_number_is_refused(decoder, wrong, flag, value):
    given = random_input(64, 64)
    given[wrong][0, 1, 3, 5] = value
    with pytest.raises(LayerDiffuseError, match=f"no numbers, or are infinite.*{flag}"):
        TransparentVAE(decoder).decode(*given, passes=1)


@NO_NUMBERS
@pytest.mark.parametrize("passes", [1, 8])
def test_a_decoder_that_answers_with_a_value_that_is_no_number_is_refused(value, passes):
    broken = TransparentDecoder.from_state_dict(random_state_dict(ReferenceDecoder(layers=1)))
    broken.conv_out.bias.data[0] = value
    with pytest.raises(LayerDiffuseError, match=r"transparent decoder has values that are no numbers.*--all-in-fp32"):
        TransparentVAE(broken).decode(*random_input(64, 64), passes=passes)


@NO_NUMBERS
def test_an_encoder_that_answers_with_a_value_that_is_no_number_is_refused(decoder, value):
    state_dict = random_state_dict(reference_encoder(), prefix="blocks.")
    state_dict[max(key for key in state_dict if key.endswith("bias"))][0] = value
    broken = TransparentEncoder.from_state_dict(state_dict)
    with pytest.raises(LayerDiffuseError, match=r"transparent encoder has values that are no numbers.*--all-in-fp32"):
        TransparentVAE(decoder, broken).encode(torch.rand(1, 4, 64, 64))
