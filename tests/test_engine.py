"""Whole jobs in the smallest model that the engine takes, beside the same written out."""

import numpy as np
import pytest
import torch
from PIL import Image
from reference import ReferenceDecoder, random_state_dict, reference_encoder
from safetensors.torch import save_file
from small_model import SCALE, SmallModel, noise_of
from torch.nn import functional as F

from lib_layerdiffuse.engine.runner import Runner, Sampling, SamplingBackend, Task
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.rgba import from_pil, over_grey, to_pil
from lib_layerdiffuse.injection.content import FIRST_CONV
from lib_layerdiffuse.methods import METHODS, Family, Layer, find_method
from lib_layerdiffuse.request.layers import Request

SIDE, STEPS = 64, 3
XL = [method for method in METHODS if method.family is Family.SDXL]


def addition(method):
    """To the only convolution, wide enough for the method's condition images."""
    generator = torch.Generator().manual_seed(len(method.key))
    return 0.1 * torch.randn(4, 4 + 4 * len(method.inputs), 3, 3, generator=generator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights")
    decoder, encoder = (
        random_state_dict(ReferenceDecoder(layers=1)),
        random_state_dict(reference_encoder(), prefix="blocks."),
    )
    for file, tensors in ((Family.SDXL.decoder, decoder), (Family.SDXL.encoder, encoder)):
        save_file({key: value.contiguous() for key, value in tensors.items()}, path / file)
    for method in XL:
        if not method.chain:
            save_file({f"{FIRST_CONV}::diff::0": addition(method)}, path / method.weights)
    return path


@pytest.fixture
def runner(folder):
    backend: SamplingBackend = SmallModel()
    return Runner(backend, lambda file: folder / file)


def picture(layer):
    channels = 4 if layer is Layer.FG else 3
    values = np.random.default_rng(len(layer.value)).integers(0, 256, (SIDE, SIDE, channels), np.uint8)
    return Image.fromarray(values)


def asked(method, **changes):
    images = {f"{layer.value}_image": picture(layer) for layer in method.inputs}
    return Request.parse([{"method": method.key, "passes": 1, **images, **changes}])


def task(**changes):
    return Task("a glass", steps=STEPS, sampler="Euler", **changes)


def expected_latent(runner, method, seed, weight=1.0):
    """The model's convolution with the addition to it, run by hand; in VAE space."""
    conv = runner.backend.unet["input_blocks"][0][0]
    x = noise_of(Sampling(["a glass"], [seed], "", SIDE, SIDE, STEPS, 7.0, "Euler"))
    given = [SCALE * runner.backend.posterior(over_grey(picture(layer)))[0] for layer in method.inputs]
    own = torch.cat([conv.weight, torch.zeros(4, 4 * len(given), 3, 3)], dim=1)
    for sigma, following in ((1, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0)):
        denoised = F.conv2d(torch.cat([x, *given], dim=1), own + weight * addition(method), conv.bias, padding=1)
        x = denoised + (x - denoised) * (following / sigma)
    return x.detach() / SCALE


@pytest.mark.parametrize("method", [method for method in XL if not method.chain], ids=lambda method: method.key)
def test_a_method_is_the_model_with_its_addition(runner, method):
    [[made], _] = runner.run(asked(method, weight=0.5), task(seed=5, count=2))
    torch.testing.assert_close(made.latent, expected_latent(runner, method, 5, 0.5))
    assert made.image.mode == ("RGBA" if method.outputs == (Layer.FG,) else "RGB")
    if made.image.mode == "RGBA":
        rgba = runner.vae.decode(runner.backend.pixels(made.latent), made.latent, 1)
        assert made.image.tobytes() == to_pil(rgba[0]).tobytes()


@pytest.mark.parametrize("method", XL, ids=lambda method: method.key)
def test_the_model_is_afterwards_as_it_was(runner, method):
    before = runner.run(None, task())[0][0].latent
    runner.run(asked(method), task())
    assert torch.equal(runner.run(None, task())[0][0].latent, before)


def test_a_chain_is_its_steps_each_with_the_pictures_of_those_before_it(runner):
    chain = find_method("xl_everything")
    [together] = runner.run(asked(chain), task(seed=1))
    images = {}
    for step, made in zip(chain.chain, together, strict=True):
        method = find_method(step.key)
        given = {f"{layer.value}_image": images[layer] for layer in method.inputs}
        alone = Request.parse([{"method": step.key, "passes": 1, "ending_step": step.stop_at, **given}])
        [[expected]] = runner.run(alone, task(seed=1))
        assert made.image.tobytes() == expected.image.tobytes()
        images[made.layer] = expected.image


@pytest.mark.parametrize("key", ["xl_transparent_attn", "xl_fg2ble"])
def test_img2img_starts_from_the_picture_with_its_transparency_in_foregrounds_only(runner, key):
    method, init = find_method(key), picture(Layer.FG)
    mean, std = runner.backend.posterior(over_grey(init))
    start = mean
    if Layer.FG in method.outputs:
        start = mean + std * runner.vae.encode(from_pil(init)[None])
    starts = []
    sample = runner.backend.sample
    runner.backend.sample = lambda sampling, start: starts.append(start) or sample(sampling, start)
    runner.run(asked(method), task(inits=[init], width=SIDE, height=SIDE, count=2))
    torch.testing.assert_close(starts[0], SCALE * start.expand(2, -1, -1, -1))


def test_a_prompt_of_a_layer_precedes_the_other(runner):
    runner.run(asked(find_method("xl_everything"), bg_prompt="a desk"), task())
    assert runner.backend.prompts == ["a glass", "a glass", "a desk, a glass"]


def test_a_method_for_other_models_is_refused(runner):
    with pytest.raises(LayerDiffuseError, match=r"needs a plain SD1\.5 checkpoint, but small is an SDXL checkpoint"):
        runner.run(asked(find_method("sd15_transparent_attn")), task())


def test_an_addition_of_another_shape_is_refused(runner, folder, tmp_path):
    method = find_method("xl_transparent_attn")
    save_file({f"{FIRST_CONV}::diff::0": torch.zeros(8, 4, 3, 3)}, tmp_path / method.weights)
    with pytest.raises(LayerDiffuseError, match="1 of its 1 additions do not fit this UNet"):
        Runner(SmallModel(), lambda file: (tmp_path if file == method.weights else folder) / file).run(
            asked(method), task()
        )
