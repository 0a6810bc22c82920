"""The commands that need a model, in a world of random weights: what they refuse, and what they leave behind."""

import errno
import os
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lib_layerdiffuse.cli import commands, models
from lib_layerdiffuse.cli.models import open_world
from lib_layerdiffuse.engine.diffusers import DiffusersBackend
from lib_layerdiffuse.images.reading import MAX_PIXELS
from lib_layerdiffuse.images.rgba import from_pil
from tests.odd_files import bomb

SIZE = 64
SMALL = ("--width", SIZE, "--height", SIZE, "--steps", 2, "--passes", 1, "--sampler", "Euler", "--output", "out")
LATENT = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def files(tmp_path):
    """Pictures and latents to start from."""
    values = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 4), np.uint8)
    Image.fromarray(values).save(tmp_path / "picture.png")
    Image.fromarray(values[:7, :9]).save(tmp_path / "odd.png")
    (tmp_path / "bomb.png").write_bytes(bomb(20_000, 20_000))
    (tmp_path / "old.png").write_bytes(b"old")
    save_file({"latent": LATENT}, tmp_path / "latent.safetensors")
    return tmp_path


def names_in(folder):
    return sorted(str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file())


def generate(run, *more):
    return run("generate", "--prompt", "a red disc", *SMALL, *more)["pictures"]


def refused(run, *words):
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert isinstance(caught.value.code, str)
    return caught.value.code


# --- generate ---


def test_pictures_are_named_by_their_seed_and_replace_no_others(run, tmp_path):
    first = generate(run, "--method", "sd15_joint", "--seed", 7, "--latents")
    second = generate(run, "--method", "sd15_joint", "--seed", 7, "--latents", "--weight", 0)
    endings = [f"-{layer}.{kind}" for layer in ("bg", "blend", "fg") for kind in ("png", "safetensors")]
    assert names_in(tmp_path) == [f"out/{stem}{ending}" for stem in ("000007-2", "000007") for ending in endings]
    for rows, stem in ((first, "000007"), (second, "000007-2")):
        assert [Path(row["file"]).name for row in rows] == [f"{stem}-{row['layer']}.png" for row in rows]
        assert [row["seed"] for row in rows] == [7, 8, 9]
    assert Path(first[0]["file"]).read_bytes() != Path(second[0]["file"]).read_bytes()


@pytest.mark.parametrize("method", ["sd15_bg2fg", "xl_bg2blefg"])
def test_the_seed_in_a_name_makes_that_picture_again(run, files, method):
    """Whether the layers are sampled together, with a seed each, or one after the other with the same."""
    chosen = ("--method", method, "--bg-image", "picture.png")
    of_two = generate(run, *chosen, "--count", 2, "--seed", 3)[2:]
    seed = Path(of_two[0]["file"]).name.partition("-")[0]
    again = generate(run, *chosen, "--seed", int(seed), "--output", "again")
    for a, b in zip(of_two, again):
        pixels = (from_pil(Image.open(row["file"])) for row in (a, b))
        torch.testing.assert_close(*pixels, rtol=0, atol=2.01 / 255)


def test_another_seed_each_time(run):
    rows = [*generate(run, "--seed", -1), *generate(run, "--seed", -1)]
    seeds = {row["seed"] for row in rows}
    assert len(seeds) == 2
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert [Path(row["file"]).name for row in rows] == [f"{row['seed']:06}-fg.png" for row in rows]


def test_the_width_and_height_may_be_what_the_model_is_used_to(run):
    [row] = run("generate", "--prompt", "x", "--steps", 1, "--passes", 1, "--height", SIZE)["pictures"]
    with Image.open(row["file"]) as image:
        assert image.size == (128, SIZE)
    assert row["file"].startswith("layerdiffuse")


def test_only_foregrounds_are_said_to_be_opaque(run, monkeypatch):
    monkeypatch.setattr("lib_layerdiffuse.cli.commands.alpha_note", lambda picture: f"The picture is {picture.mode}.")
    found = run("generate", "--prompt", "x", *SMALL, "--method", "sd15_joint")
    assert found["notes"] == ["The picture is RGBA."]


def test_what_was_done_beyond_the_words_is_noted(run, files, capsys):
    found = run("generate", "--prompt", "x", *SMALL, "--bg-image", "picture.png", "--weight", 0)
    assert any("takes no background image" in note for note in found["notes"])


LONG = "a red glass ball at the center, " * 30


@pytest.mark.parametrize("method", ["sd15_joint", "xl_transparent_attn"])
def test_the_end_of_a_long_prompt_is_read(run, method):
    made = [
        Image.open(generate(run, "--method", method, "--prompt", LONG + end)[0]["file"]).tobytes()
        for end in ("red circle", "blue square", "red circle")
    ]
    assert made[0] == made[2] != made[1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--width", 100_000, "--height", 100_000), f"10,000,000,000 pixels, and {MAX_PIXELS:,} is the limit"),
        (("--count", 100_000), "pixels, and "),
        (("--method", "sd15_joint", "--count", 9000), "pixels, and "),  # three pictures each
        (("--width", 100), "The width is 100. Choose one from 64 that 8 divides."),
        (("--height", 32), "The height is 32."),
        (("--count", 0), "0 pictures of 2 steps"),
        (("--steps", 0), "1 pictures of 0 steps"),
        (("--steps", 1001), "1001 steps were asked for. Choose at most 1000."),
        (("--cfg", "nan"), "The CFG scale is nan"),
        (("--cfg", "inf"), "The CFG scale is inf"),
        (("--seed", -2), "The seed is -2. Choose one from 0 to "),
        (("--seed", 2**64), f"The seed is {2**64}."),
        (("--seed", 2**64 - 2, "--method", "sd15_joint"), f"from 0 to {2**64 - 3}."),
        (("--sampler", "Oiler"), "There is no sampler Oiler"),
        (("--strength", "nan"), "The strength is nan"),
        (("--strength", 1.5), "The strength is 1.5"),
        (("--init", "picture.png", "--strength", 0.03, "--steps", 25),
         "0.03 leaves none of 25 steps. Choose a strength of at least 0.04, or at least 34 steps."),
        (("--init", "picture.png", "--method", "xl_everything"), "cannot start from a picture"),
        (("--init", "bomb.png"), "bomb.png has more than"),
        (("--init", "old.png"), "old.png is not a whole picture"),
        (("--fg-image", "bomb.png"), "bomb.png has more than"),
        (("--bg-image", "nothing.png"), "No such file: nothing.png"),
        (("--prompt", "a\udcff"), "The prompt 'a\\udcff' is not text in UTF-8"),
        (("--negative", "a\udcff"), "The prompt 'a\\udcff' is not text in UTF-8"),
        (("--fg-prompt", "a\udcff"), "is 'a\\udcff'. Set it to text."),
        (("--output", "old.png"), "old.png is no folder"),
        (("--output", "old.png/below"), "old.png is no folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_generated_is_said_before_a_model_is_read(run, files, monkeypatch, words, sentence):
    monkeypatch.setattr(commands, "open_runner", lambda *_: pytest.fail("a model was read"))
    before = names_in(files)
    assert sentence in refused(run, "generate", "--prompt", "x", *SMALL, *words)
    assert names_in(files) == before


@pytest.mark.parametrize("strength", [0.5, 0.9])
def test_a_strength_that_leaves_one_step_is_enough(run, files, strength):
    assert len(generate(run, "--init", "picture.png", "--strength", strength)) == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--device", "nonsense"), "There is no device 'nonsense'"),
        (("--device", "meta"), "There is no device 'meta'"),
        (("--device", "cuda:99"), "There is no device 'cuda:99'"),
        (("--model", "/nope.safetensors"), "/nope.safetensors cannot be loaded: there is no such file or folder"),
        (("--model", "models/nope.ckpt"), "no such file or folder"),
        (("--model", "nowhere"), "no such file or folder"),
        (("--model", "a/b/c"), "no such file or folder"),
        (("--model", "old.png"), "no plain SD1.5 or SDXL checkpoint"),
        (("--model", "latent.safetensors"), "no plain SD1.5 or SDXL checkpoint"),
        (("--model", "."), ". cannot be loaded: "),
        (("--model", "old.png", "--config", "nowhere"), "nowhere cannot be loaded: there is no such file or folder"),
    ],
)
def test_models_and_devices_that_are_not_there_are_said(run, files, words, sentence):
    found = refused(run, "generate", "--prompt", "x", *SMALL, *words)
    assert sentence in found and "repo" not in found.lower()


def test_json_goes_without_progress(run, files):
    logs = [import_module(f"{library}.utils.logging") for library in ("diffusers", "transformers")]
    for each in logs:
        each.enable_progress_bar()
    run("encode", "picture.png", "new.safetensors")
    assert not any(each.is_progress_bar_enabled() for each in logs)


def test_a_name_on_hugging_face_is_asked_for_there(run, monkeypatch):
    asked = []
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda name, **_: asked.append(name) or 1 / 0)
    for name in ("owner/model", "stabilityai/stable-diffusion-xl-base-1.0"):
        found = refused(run, "generate", "--prompt", "x", "--model", name)
        assert found == f"{name} (from Hugging Face, as it is not here) cannot be loaded: division by zero"
        assert asked.pop() == name


@pytest.mark.parametrize("more", [(), ("--plain",)])
def test_an_answer_of_no_numbers_is_said(run, files, monkeypatch, more):
    sample = DiffusersBackend.sample
    monkeypatch.setattr(DiffusersBackend, "sample", lambda *words: sample(*words) * float("nan"))
    before = names_in(files)
    assert "values that are no numbers" in refused(run, "generate", "--prompt", "x", *SMALL, *more)
    assert names_in(files) == before


def test_a_latent_that_the_model_cannot_show_is_said(run, files):
    save_file({"latent": LATENT * 1e30}, "huge.safetensors")
    assert "values that are no numbers" in refused(run, "decode", "huge.safetensors", "new.png")


def test_a_full_disk_leaves_no_part_of_a_set(run, tmp_path, monkeypatch):
    real = Path.write_bytes

    def write_bytes(path, content):
        real(path, content[:10])
        if len(names_in(tmp_path)) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    found = refused(run, "generate", "--prompt", "x", *SMALL, "--method", "sd15_joint")
    assert "000000-blend.png cannot be written: No space left on device" in found
    assert names_in(tmp_path) == []


# --- encode and decode ---


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("encode", "odd.png", "new.safetensors"), "The picture has 9x7 pixels. Choose a width and height that 8"),
        (("encode", "bomb.png", "new.safetensors"), "bomb.png has more than"),
        (("encode", "nothing.png", "new.safetensors"), "No such file: nothing.png"),
        (("encode", "picture.png", "new.png"), "new.png cannot hold a latent. Choose a name that ends in .safetensors"),
        (("encode", "picture.png", "latent.safetensors"), "latent.safetensors is there already"),
        (("encode", "picture.png", "old.png/new.safetensors"), "old.png is no folder"),
        (("decode", "nothing.safetensors", "new.png"), "No such file: nothing.safetensors"),
        (("decode", "old.png", "new.png"), "old.png is no safetensors file, or is not whole"),
        (("decode", ".", "new.png"), ". cannot be read: "),
        (("decode", "latent.safetensors", "new.jpg"), "new.jpg cannot hold a picture with transparency. Choose a name"),
        (("decode", "latent.safetensors", "new"), "new cannot hold"),
        (("decode", "latent.safetensors", "old.png"), "old.png is there already"),
        (("decode", "latent.safetensors", "new.png", "--painted", "bomb.png"), "bomb.png has more than"),
        (("decode", "latent.safetensors", "new.png", "--painted", "odd.png"), "odd.png has 9x7 pixels, and the file"),
    ],
)
def test_files_that_do_not_do_are_said_before_a_model_is_read(run, files, monkeypatch, words, sentence):
    monkeypatch.setattr(commands, "open_runner", lambda *_: pytest.fail("a model was read"))
    before = names_in(files)
    assert sentence in refused(run, *words)
    assert names_in(files) == before


ODD_LATENTS = {
    "two channels": ({"latent": LATENT[:, :2]}, "It has 0 among 1: latent (1, 2, 8, 8) F32."),
    "without pictures' dimension": ({"latent": LATENT[0]}, "latent (4, 8, 8) F32"),
    "of no picture": ({"latent": LATENT[:0]}, "latent (0, 4, 8, 8)"),
    "whole numbers": ({"latent": LATENT.int()}, "latent (1, 4, 8, 8) I32"),
    "nothing": ({}, "It has 0 among 0"),
    "a single number": ({"latent": torch.tensor(1.0)}, "latent () F32"),
    "two of other names": ({"a": LATENT, "b": LATENT + 1}, "It has 2 among 2: a (1, 4, 8, 8) F32, b"),
    "not a number": ({"latent": LATENT * float("nan")}, "no numbers (NaN or infinite)"),
    "infinite": ({"latent": 1 / (0 * LATENT)}, "no numbers (NaN or infinite)"),
    "too large for float32": ({"latent": LATENT.double() * 1e300}, "no numbers (NaN or infinite)"),
    "far too large": ({"latent": torch.zeros(1, 4, 2000, 1000)}, "latent (1, 4, 2000, 1000)"),
}


@pytest.mark.parametrize(("tensors", "sentence"), ODD_LATENTS.values(), ids=ODD_LATENTS)
def test_files_without_a_latent_are_said(run, files, monkeypatch, tensors, sentence):
    monkeypatch.setattr(commands, "open_runner", lambda *_: pytest.fail("a model was read"))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, "odd.safetensors")
    assert sentence in refused(run, "decode", "odd.safetensors", "new.png")


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_file_that_was_cut_is_said(run, files, size):
    (files / "cut.safetensors").write_bytes((files / "latent.safetensors").read_bytes()[:size])
    assert "cut.safetensors is no safetensors file, or is not whole" in refused(
        run, "decode", "cut.safetensors", "a.png"
    )


FOREIGN = {
    "of a sampler": {"samples": LATENT},
    "with a version": {"latent_tensor": LATENT, "latent_format_version_0": torch.zeros(0)},
    "ours among others": {"latent": LATENT, "noise": LATENT + 1},
    "double": {"latent": LATENT.double()},
}


@pytest.mark.parametrize("tensors", FOREIGN.values(), ids=FOREIGN)
def test_latents_of_other_programs_are_decoded(run, files, tensors):
    save_file(tensors, "other.safetensors")
    for name in ("latent", "other"):
        assert run("decode", f"{name}.safetensors", f"{name}.png", "--passes", 1)["files"] == [f"{name}.png"]
    assert Image.open("latent.png").tobytes() == Image.open("other.png").tobytes()


def test_all_latents_of_a_file_are_decoded(run, files):
    save_file({"latent": torch.cat([LATENT, LATENT + 1])}, "both.safetensors")
    save_file({"latent": LATENT + 1}, "second.safetensors")
    assert run("decode", "both.safetensors", "new.webp", "--passes", 1)["files"] == ["new-1.webp", "new-2.webp"]
    for alone, of_both in (("latent", "new-1.webp"), ("second", "new-2.webp")):
        run("decode", f"{alone}.safetensors", f"{alone}.png", "--passes", 1)
        assert Image.open(of_both).tobytes() == Image.open(f"{alone}.png").tobytes()
    assert "new-1.webp is there already" in refused(run, "decode", "both.safetensors", "new.webp")
    assert "has 2 of 64x64" in refused(run, "decode", "both.safetensors", "more.png", "--painted", "picture.png")


def test_encode_makes_the_folder_and_replaces_what_it_may(run, files):
    found = run("encode", "picture.png", "below/new.safetensors")
    assert found["shape"] == [1, 4, 8, 8]
    run("encode", "picture.png", "latent.safetensors", "--overwrite")
    tensors = [load_file(name)["latent"] for name in ("below/new.safetensors", "latent.safetensors")]
    assert torch.equal(*tensors)


DAMAGE = {"cut": lambda path: path.write_bytes(path.read_bytes()[:200]), "missing": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("included", [True, False], ids=["the world", "a model"])
def test_a_model_whose_files_are_damaged_is_said(run, world, tmp_path, monkeypatch, included, name, damage):
    copy = tmp_path / "world"
    shutil.copytree(world, copy)
    monkeypatch.setattr(models, "WORLD", copy)
    monkeypatch.setattr(models, "open_world", open_world)
    damage(copy / "sd15" / name)
    words = () if included else ("--model", copy / "sd15")
    found = refused(run, "generate", "--method", "sd15_transparent_attn", "--prompt", "x", *SMALL, *words)
    assert "cannot be loaded: " in found and "\n" not in found
