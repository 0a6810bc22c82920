"""The trainers of UNets, on the tiny world's models with random weights."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from lib_layerdiffuse.images.rgba import GREY, compose
from lib_layerdiffuse.injection.content import load_injection
from lib_layerdiffuse.methods import Family, Layer, find_method
from lib_layerdiffuse.nets.encoder import TransparentEncoder
from lib_layerdiffuse.vae import TransparentVAE
from training import injection
from training.data import open_source
from training.diffusion import Encoder, read_prompts
from training.injection import InjectionSettings
from training.tiny import base
from training.tiny import vae as tiny_vae
from training.tiny.__main__ import STAGES
from training.tiny.base import BaseSettings
from training.tiny.models import MAKERS, make_vae
from training.tiny.vae import VaeSettings
from training.trainer import Kept, cropped, parse, save_halves, train

SIZE = 64
FEW = {"size": SIZE, "batch": 2, "steps": 2, "workers": 0, "save_every": 1}


@pytest.fixture(autouse=True)
def _process_of_its_own():
    """As far as accelerate knows."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    vae = make_vae()
    for family, make in MAKERS.items():
        make(vae).save_pretrained(folder / family.value)
    encoder = TransparentEncoder([4, *(8,) * 8, 4])
    save_halves(encoder.state_dict(), folder / "encoder.safetensors")
    return folder


def settings(models, output, key, **more):
    method = find_method(key)
    named = {"model": str(models / method.family.value), "method": key, "data": "scenes:1", "output": str(output)}
    encoder = {"encoder": str(models / "encoder.safetensors")} if method.makes_foreground else {}
    return InjectionSettings(**(FEW | named | encoder | {"rank": 4, "signal": 8} | more))


@pytest.mark.parametrize(
    ("key", "more"),
    [
        ("sd15_transparent_attn", {"precision": "bf16"}),
        ("sd15_joint", {"keep": 3, "checkpointing": True}),
        ("sd15_bg2fg", {"accumulate": 2}),
        ("xl_transparent_attn", {"keep": 3}),
        ("xl_transparent_conv", {}),
        ("xl_fgble2bg", {"precision": "bf16", "checkpointing": True}),
    ],
)
def test_it_trains_what_the_extension_reads(models, tmp_path, key, more):
    train(settings(models, tmp_path, key, **more), injection.make)
    method = find_method(key)
    found = load_injection(method, tmp_path / method.weights)
    assert found.method is method
    tensors = load_file(tmp_path / method.weights)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    zeros = [name for name, tensor in tensors.items() if not tensor.any()]
    assert len(zeros) < len(tensors) / 2, "most of it has not learnt anything"


def test_a_run_goes_on_where_it_was(models, tmp_path):
    train(settings(models, tmp_path, "sd15_joint"), injection.make)
    state = tmp_path / "state"
    learnt = list(load_file(state / "learnt.safetensors"))  # not the tensors: on Windows, no mapped file is written to
    assert learnt and not any(".unet." in name for name in learnt), "the frozen UNet is among what is saved"
    assert torch.load(state / "custom_checkpoint_1.pkl")["step"] == 2
    train(settings(models, tmp_path, "sd15_joint", steps=3), injection.make)
    assert torch.load(state / "custom_checkpoint_1.pkl")["step"] == 3
    assert list((tmp_path / "log").rglob("events.*"))


@pytest.mark.parametrize(
    ("key", "more", "sentence"),
    [
        ("xl_everything", {}, "no weights of its own: it runs xl_transparent_attn, xl_fg2ble, xl_fgble2bg"),
        ("xl_transparent_attn", {"encoder": ""}, "name the transparent encoder with --encoder"),
    ],
)
def test_what_cannot_be_trained_is_said(models, tmp_path, key, more, sentence):
    with pytest.raises(SystemExit, match=sentence):
        train(settings(models, tmp_path, key, **more), injection.make)


def layered(random=0):
    generator = torch.Generator().manual_seed(random)

    def sample(layer):
        rgba = torch.rand(2, 4, SIZE, SIZE, generator=generator)
        if layer is not Layer.FG:
            rgba[:, 3:] = 1
        return {"rgba": rgba, "caption": [f"first {layer.value}", f"second {layer.value}"]}

    return {layer.value: sample(layer) for layer in Layer}


def test_foregrounds_are_offset_and_conditions_are_not():
    torch.manual_seed(0)
    pipeline = MAKERS[find_method("xl_bgble2fg").family](make_vae())
    pair = TransparentVAE(torch.nn.Identity(), TransparentEncoder([4, *(8,) * 8, 4]))
    batch = layered()
    made = Encoder(pipeline, pair, (Layer.BG, Layer.BLEND), (Layer.FG,))(batch)
    assert made["latents"].shape == (2, 1, 4, SIZE // 8, SIZE // 8)
    assert made["captions"] == [["first fg", "second fg"]]
    scale = pipeline.vae.config.scaling_factor

    def posterior(layer):
        with torch.no_grad():
            return pipeline.vae.encode(2 * compose(batch[layer]["rgba"], GREY) - 1).latent_dist

    fg = posterior("fg")
    torch.testing.assert_close(made["latents"][:, 0], scale * (fg.mean + fg.std * pair.encode(batch["fg"]["rgba"])))
    assert not torch.allclose(made["latents"][:, 0], scale * fg.mean)
    expected = torch.cat([posterior("bg").mean, posterior("blend").mean], dim=1) * scale
    torch.testing.assert_close(made["condition"], expected)
    read = Encoder(pipeline, pair, (Layer.FG,), (Layer.BLEND,))(batch)["condition"]
    torch.testing.assert_close(read, scale * fg.mean)


def test_controls_are_pictures_over_grey():
    torch.manual_seed(0)
    pipeline = MAKERS[find_method("sd15_fg2bg").family](make_vae())
    batch = layered()
    made = Encoder(pipeline, None, (Layer.FG,), (Layer.BG, Layer.BLEND))(batch)
    torch.testing.assert_close(made["condition"], compose(batch["fg"]["rgba"], GREY))
    assert made["latents"].shape[:2] == (2, 2)


class Answering(torch.nn.Module):
    """A network that answers with the noise that is in what it sees, and notes what it is told."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = []

    def forward(self, noisy, timesteps, context, added, condition):
        self.seen.append((noisy, timesteps, context, condition))
        return noisy * self.weight


def test_frames_share_a_timestep_and_have_captions_of_their_own(models, tmp_path):
    chosen = settings(models, tmp_path, "sd15_joint", unconditional=0.0)
    pipeline = MAKERS[find_method("sd15_joint").family](make_vae())
    net = Answering()
    encoder = Encoder(pipeline, None, (), tuple(Layer))
    trainer = injection.InjectionTrainer(chosen, Accelerator(), net, pipeline, encoder)
    example = encoder(layered())
    _, goal, noisy = trainer.answer(example, torch.tensor([100, 900]))
    _, timesteps, context, _ = net.seen[0]
    assert timesteps.tolist() == [100] * 3 + [900] * 3
    captions = [f"{which} {layer.value}" for which in ("first", "second") for layer in Layer]
    torch.testing.assert_close(context, read_prompts(pipeline, captions, noisy)[0])
    share = trainer.noise.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy, share.sqrt() * example["latents"].flatten(0, 1) + (1 - share).sqrt() * goal)
    trainer.settings = settings(models, tmp_path, "sd15_joint", unconditional=1.0)
    trainer.answer(example, torch.tensor([100, 900]))
    torch.testing.assert_close(net.seen[1][2], read_prompts(pipeline, [""] * 6, noisy)[0])


def test_offset_noise_has_means_of_its_own(models, tmp_path):
    """Those of a whole channel: 64 numbers have one of 1/8 without it."""
    pipeline = MAKERS[find_method("sd15_joint").family](make_vae())
    encoder = Encoder(pipeline, None, (), tuple(Layer))
    example, seen = encoder(layered()), {}
    for offset in (0.0, 3.0):
        chosen = settings(models, tmp_path, "sd15_joint", noise_offset=offset)
        trainer = injection.InjectionTrainer(chosen, Accelerator(), Answering(), pipeline, encoder)
        torch.manual_seed(0)
        noise = trainer.answer(example, torch.tensor([999, 999]))[1]
        seen[offset] = noise.mean((2, 3)).std().item(), (noise - noise.mean((2, 3), keepdim=True)).std().item()
    assert seen[0.0] == pytest.approx((1 / 8, 1), rel=0.3)
    assert seen[3.0] == pytest.approx((3, 1), rel=0.3)


def test_kept_samples_are_those_of_the_source(models, tmp_path):
    pipeline = MAKERS[find_method("sd15_joint").family](make_vae())
    encoder = Encoder(pipeline, None, (Layer.FG,), (Layer.BG, Layer.BLEND))
    dataset = torch.utils.data.Subset(injection.open_layers("scenes:3", SIZE), range(3))
    kept = Kept(dataset, settings(models, tmp_path, "sd15_fg2bg", keep=3), encoder)
    by_captions = {tuple(each["captions"]): each for each in kept}
    assert len(kept) == len(by_captions) == 3
    for sample in dataset:
        alone = encoder(torch.utils.data.default_collate([sample]))
        found = by_captions[tuple(caption for [caption] in alone["captions"])]
        for name in ("latents", "condition"):
            torch.testing.assert_close(found[name], alone[name][0], rtol=1e-4, atol=1e-5)


def test_kept_pictures_come_in_a_random_order_from_every_part_of_a_source(tmp_path):
    torch.manual_seed(0)
    chosen = VaeSettings(data="", output="", **(FEW | {"keep": 12}))
    kept = Kept(open_source("scenes:1+pictures:1", 16), chosen, lambda batch: batch)
    assert len({sample["caption"] for sample in kept}) > 6
    opaque = sum(bool((sample["rgba"][3] == 1).all()) for sample in kept)
    assert 0 < opaque < 12


@pytest.mark.parametrize("family", ["sdxl", pytest.param("sd15", marks=pytest.mark.full)])
def test_a_world_from_nothing(models, tmp_path, family):
    train(VaeSettings(data="scenes:1+pictures:1", output=str(tmp_path / "vae"), **FEW), tiny_vae.make)
    config = json.loads((tmp_path / "vae" / "config.json").read_text(encoding="utf-8"))
    assert 0.01 < config["scaling_factor"] != 0.18215
    named = {"family": family, "vae": str(tmp_path / "vae"), "data": "pictures:1", "output": str(tmp_path / family)}
    train(BaseSettings(**(FEW | named | {"keep": 4})), base.make)
    chosen = settings(tmp_path, tmp_path / "out", {"sd15": "sd15_fg2bg", "sdxl": "xl_fg2ble"}[family])
    train(chosen, injection.make)
    assert (tmp_path / "out" / find_method(chosen.method).weights).exists()


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_of_the_recipe_is_a_command_that_its_program_understands(stage):
    command = stage.command(Path("WORK"), Path("WORK") / stage.name)
    programs = {
        "training.tiny.vae": (VaeSettings, tiny_vae.HELP),
        "training.tiny.base": (BaseSettings, base.HELP),
        "training.injection": (InjectionSettings, injection.HELP),
    }
    if command[1] in programs:
        kind, about = programs[command[1]]
        assert parse(kind, None, about, command[2:]).output == str(Path("WORK") / stage.name)


def test_parts_of_pictures_are_random_and_of_their_size():
    torch.manual_seed(0)
    pictures = torch.arange(20.0 * 16).view(1, 1, 20, 16).expand(2, 3, -1, -1)
    assert cropped(pictures, 0) is pictures
    parts = [cropped(pictures, 8) for _ in range(400)]
    assert {part.shape for part in parts} == {(2, 3, 8, 8)}
    corners = {int(part[0, 0, 0, 0]) for part in parts}
    assert {corner // 16 for corner in corners} == set(range(13))
    assert {corner % 16 for corner in corners} == set(range(9))
    assert all(torch.equal(part[0, 0, 0] - part[0, 0, 0, 0], torch.arange(8.0)) for part in parts)


def test_the_learning_rate_rises_and_falls(models, tmp_path):
    chosen = settings(models, tmp_path, "sd15_joint", schedule="cosine", warmup=2, steps=6)
    trainer = injection.InjectionTrainer(chosen, Accelerator(), Answering(), MAKERS[Family.SD15](make_vae()), None)
    rates = []
    for _ in range(6):
        rates.append(trainer.rate.get_last_lr()[0] / chosen.rate)
        trainer.descend(
            sum(weight.square().sum() for weight in trainer.learning()), trainer.net, trainer.optimizer, trainer.rate
        )
    assert rates[:3] == [0, 0.5, 1]
    assert 1 > rates[3] > rates[4] > rates[5] > 0
