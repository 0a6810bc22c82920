"""Jobs without a web UI, and the command line, in a world of random weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from lib_layerdiffuse.engine.diffusers import DiffusersBackend
from lib_layerdiffuse.images.rgba import from_pil, over
from lib_layerdiffuse.methods import METHODS, Layer, find_method

SIZE = 64


def generate(run, *more):
    small = ("--width", SIZE, "--height", SIZE, "--steps", 2, "--passes", 1, "--sampler", "Euler")
    return run("generate", "--prompt", "a red disc", "--output", "out", *small, *more)["pictures"]


@pytest.fixture
def given(tmp_path):
    random = np.random.default_rng(0)
    paths = {layer: tmp_path / f"{layer.value}.png" for layer in Layer}
    for layer, path in paths.items():
        channels = 4 if layer is Layer.FG else 3
        Image.fromarray(random.integers(0, 256, (SIZE, SIZE, channels), np.uint8)).save(path)
    return paths


def inputs_of(method, given):
    return [word for layer in method.inputs for word in (f"--{layer.value}-image", given[layer])]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.key)
def test_every_method_makes_its_layers(run, method, given):
    made = generate(run, "--method", method.key, *inputs_of(method, given), "--count", 2)
    assert [row["layer"] for row in made] == [layer.value for layer in method.outputs] * 2
    assert [row["picture"] for row in made] == [i // method.frames for i in range(2 * method.frames)]
    for row in made:
        image = Image.open(row["file"])
        assert image.size == (SIZE, SIZE)
        assert image.mode == ("RGBA" if row["layer"] == "fg" else "RGB")
    assert len({Image.open(row["file"]).tobytes() for row in made}) == len(made)


@pytest.mark.parametrize(("method", "wrong"), [("pixels", "picture"), ("posterior", "latent")])
@pytest.mark.parametrize("more", [["--plain"], ["--method", "sd15_bg2fg"]], ids=["plain", "layers"])
def test_a_vae_that_answers_with_no_numbers_is_said(run, given, monkeypatch, method, wrong, more):
    answer = getattr(DiffusersBackend, method)
    broken = {"pixels": lambda *args: answer(*args) * float("nan"),
              "posterior": lambda *args: [part * float("inf") for part in answer(*args)]}  # fmt: skip
    monkeypatch.setattr(DiffusersBackend, method, broken[method])
    with pytest.raises(SystemExit, match=rf"{wrong} that the VAE made has values that are no numbers"):
        generate(run, *more, "--bg-image", given[Layer.BG], "--init", given[Layer.BG])


@pytest.mark.parametrize("key", ["sd15_joint", "sd15_bg2fg", "xl_transparent_conv", "xl_fg2ble"])
def test_weight_zero_is_the_model_alone(run, key, given):
    method = find_method(key)
    chosen = ("--method", key, *inputs_of(method, given), "--latents")

    def latents(*more):
        rows = generate(run, *more)
        return [load_file(row["file"].replace(".png", ".safetensors"))["latent"] for row in rows]

    alone = latents("--plain", "--family", method.family.value, "--latents", "--count", method.frames)
    off, on = latents(*chosen, "--weight", 0), latents(*chosen)
    assert all(map(torch.equal, alone, off))
    assert not any(map(torch.equal, alone, on))


def test_prompts_of_layers_reach_their_layers(run):
    def files(*more):
        return [
            Image.open(row["file"]).tobytes() for row in generate(run, "--method", "sd15_joint", "--weight", 0, *more)
        ]

    before, after = files(), files("--bg-prompt", "a striped background")
    assert [a == b for a, b in zip(before, after)] == [True, False, True]


def test_img2img_keeps_what_a_low_strength_leaves(run, given):
    chosen = ("--method", "xl_transparent_attn", "--weight", 0, "--init", given[Layer.FG], "--steps", 10, "--latents")
    [low] = generate(run, *chosen, "--strength", 0.1)
    latent = load_file(low["file"].replace(".png", ".safetensors"))["latent"]
    run("encode", given[Layer.FG], "start.safetensors", "--family", "sdxl")
    start = load_file("start.safetensors")["latent"]
    [other] = generate(run, *chosen, "--strength", 1)
    far = load_file(other["file"].replace(".png", ".safetensors"))["latent"]
    assert (latent - start).abs().mean() < (far - start).abs().mean()


def test_transparency_goes_into_the_starts_of_foregrounds_only(run, world, given, monkeypatch):
    scaling = json.loads((world / "vae" / "config.json").read_text(encoding="utf-8"))["scaling_factor"]
    starts = []
    monkeypatch.setattr(DiffusersBackend, "sample", lambda self, sampling, start: starts.append(start) or start)
    generate(run, "--method", "sd15_joint", "--weight", 0, "--init", given[Layer.FG])
    run("encode", given[Layer.FG], "start.safetensors", "--family", "sd15")
    foreground, background, blend = starts[0]
    torch.testing.assert_close(foreground, scaling * load_file("start.safetensors")["latent"][0])
    assert torch.equal(background, blend)
    assert not torch.allclose(foreground, background)


def test_decoding_a_saved_latent_gives_the_same_picture(run):
    [row] = generate(run, "--method", "xl_transparent_attn", "--latents")
    run("decode", row["file"].replace(".png", ".safetensors"), "again.png", "--family", "sdxl", "--passes", 1)
    first, again = (from_pil(Image.open(path)) for path in (row["file"], "again.png"))
    torch.testing.assert_close(again, first, rtol=0, atol=1.01 / 255)


def test_compose(run, given):
    run("compose", given[Layer.FG], given[Layer.BG], "composed.png")
    expected = over(Image.open(given[Layer.FG]), Image.open(given[Layer.BG]))
    assert Image.open("composed.png").tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--method", "sd15_bg2fg"), "needs a background image"),
        (("--method", "xl_transparent"), "There is no method 'xl_transparent'"),
        (("--weight", "much"), "Weight .* is 'much'. Set it to a number from 0 to 2"),
        (("--width", "100"), "The width is 100. Choose"),
        (("--sampler", "Oiler"), "There is no sampler Oiler. Choose one of Euler"),
        (("--fg-image", "nothing.png"), "No such file.*nothing.png"),
        (("--method", "xl_everything", "--init", "bg.png"), "cannot start from a picture"),
        (("--count", "0"), "0 pictures of 2 steps"),
        (("--model", "nowhere"), "nowhere cannot be loaded: there is no such file"),
    ],
)
def test_what_cannot_be_done_is_said(run, given, words, sentence):
    with pytest.raises(SystemExit, match=sentence):
        generate(run, *words)
