"""The trainer of the transparent pair, on a tiny VAE with random weights."""

import json
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from lib_layerdiffuse.images.rgba import GREY, compose, pad_colors
from lib_layerdiffuse.nets.decoder import TransparentDecoder
from lib_layerdiffuse.nets.encoder import TransparentEncoder
from lib_layerdiffuse.vae import ORIENTATIONS, TransparentVAE
from training import harm, transparent_vae
from training.harm import measure
from training.scenes import scene, to_image
from training.trainer import parse
from training.trainer import train as run
from training.transparent_vae import HELP, PairSettings, TransparentPair, load_vae, make, patch_gan, there_and_back

SIZE = 64
ENCODER = (8,) * 8
DECODER = (8,) * 7


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    path = tmp_path_factory.mktemp("model")
    vae.save_pretrained(path / "vae")
    return path


@pytest.fixture(autouse=True)
def _process_of_its_own():
    """As far as accelerate knows."""
    AcceleratorState._reset_state(reset_partial_state=True)


def settings(model, output, steps, *more):
    widths = ("--encoder-widths", *map(str, ENCODER), "--decoder-widths", *map(str, DECODER))
    own = ("--size", str(SIZE), "--batch", "2", "--workers", "0", "--adversarial-from", "2", "--save-every", "2")
    named = ("--vae", str(model), "--data", "scenes:1", "--output", str(output), "--steps", str(steps))
    return parse(PairSettings, None, HELP, [*named, *own, *widths, *more])


def train(chosen):
    run(chosen, make)


def rgba(count=2):
    return torch.stack([torch.from_numpy(scene(i, size=SIZE).rgba).permute(2, 0, 1) for i in range(count)])


@pytest.mark.parametrize("more", [(), ("--precision", "bf16", "--checkpointing", "--accumulate", "2")])
def test_what_it_writes_is_what_the_extension_reads(model, tmp_path, more):
    before = load_file(model / "vae" / "diffusion_pytorch_model.safetensors")
    train(settings(model, tmp_path, 3, *more))
    encoder, decoder = (load_file(tmp_path / f"vae_transparent_{part}.safetensors") for part in ("encoder", "decoder"))
    assert {tensor.dtype for tensor in (*encoder.values(), *decoder.values())} == {torch.float16}
    vae = TransparentVAE(TransparentDecoder.from_state_dict(decoder), TransparentEncoder.from_state_dict(encoder))
    offset = vae.encode(rgba())
    assert offset.shape == (2, 4, SIZE // 8, SIZE // 8)
    assert vae.decode(rgba()[:, :3], offset).shape == (2, 4, SIZE, SIZE)
    assert offset.abs().max() > 0, "the encoder has not learnt anything"
    after = load_vae(str(model)).state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_run_goes_on_where_it_was(model, tmp_path):
    train(settings(model, tmp_path, 2))
    state = tmp_path / "state"
    assert torch.load(state / "custom_checkpoint_1.pkl")["step"] == 2
    train(settings(model, tmp_path, 4))
    assert torch.load(state / "custom_checkpoint_1.pkl")["step"] == 4
    assert list((tmp_path / "log").rglob("events.*"))


def test_fewer_pictures_than_a_batch_are_enough(model, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    to_image(scene(0, size=SIZE).rgba).save(folder / "0.png")
    (folder / "0.txt").write_text("a solid red star", encoding="utf-8")
    train(settings(model, tmp_path / "out", 2, "--data", str(folder)))
    assert torch.load(tmp_path / "out" / "state" / "custom_checkpoint_1.pkl")["step"] == 2


def test_it_starts_from_the_frozen_vae_itself(model):
    vae = load_vae(str(model))
    pair = TransparentPair(vae, ENCODER, DECODER)
    truth, answer, grey, seen = pair(rgba())
    assert torch.equal(truth, torch.cat([rgba()[:, 3:], pad_colors(rgba())], dim=1))
    assert answer.shape == truth.shape
    torch.testing.assert_close(seen, vae.decode(vae.encode(2 * grey - 1).latent_dist.mean).sample / 2 + 0.5)
    assert not any(name.startswith("_vae") for name, _ in pair.named_parameters())


def test_pictures_reach_the_end_of_a_new_encoder(model):
    """Before its last convolution, which starts at 0."""
    torch.manual_seed(0)
    encoder = TransparentPair(load_vae(str(model)), (64,) * 8, DECODER).encoder
    seen = []
    encoder.blocks[-2].register_forward_hook(lambda module, inputs, output: seen.append(output))
    pictures = [torch.rand(2, 4, 4, 4).repeat_interleave(16, 2).repeat_interleave(16, 3) for _ in range(2)]
    for argb in pictures:
        encoder(argb)
    assert (seen[0] - seen[1]).std() > 0.02 * (pictures[0] - pictures[1]).std()


@pytest.fixture
def upright(model, monkeypatch):
    """A VAE, a pair whose weights come from a seed, and the latents that its decoder is told, as they lie."""
    monkeypatch.setattr(transparent_vae, "ORIENTATIONS", ORIENTATIONS[:1])

    def make(seed, deviation):
        torch.manual_seed(seed)
        vae = load_vae(str(model))
        pair = TransparentPair(vae, ENCODER, DECODER)
        torch.nn.init.normal_(pair.encoder.blocks[-1].weight, std=deviation)
        latents = []
        pair.decoder.register_forward_pre_hook(lambda _, inputs: latents.append(inputs[1]))
        return vae, pair, latents

    return make


def test_the_offset_in_training_is_that_of_the_extension(upright):
    """× 300 and in units of the posterior's deviation, as decoding and img2img take it."""
    vae, pair, latents = upright(1, 1e-3)
    _, _, grey, _ = pair(rgba())
    posterior = vae.encode(2 * grey - 1).latent_dist
    offset = TransparentVAE(pair.decoder, pair.encoder).encode(rgba())
    torch.testing.assert_close(latents[0], posterior.mean + posterior.std * offset)


def test_the_decoder_is_asked_in_every_orientation(model):
    """And what it answers is turned back, as when it decodes."""
    torch.manual_seed(3)
    pair = TransparentPair(load_vae(str(model)), ENCODER, DECODER)
    seen, given = set(), pair(rgba(1))[3]
    pair.decoder.forward = lambda rgb, latent: torch.cat([rgb[:, :1], rgb], dim=1)
    pair.decoder.register_forward_pre_hook(
        lambda _, inputs: seen.update(
            i for i, each in enumerate(ORIENTATIONS) if torch.equal(inputs[0], each.apply(given))
        )
    )
    for _ in range(40):
        _, answer, _, shown = pair(rgba(1))
        assert torch.equal(answer[:, 1:], shown)
    assert seen == set(range(8))


def test_the_decoder_sees_latents_with_noise(model):
    """As large as asked in sampler space, in what it is told and in what the VAE shows of it."""
    torch.manual_seed(4)
    vae = load_vae(str(model))
    given = rgba().repeat(4, 1, 1, 1)[:, :3]
    plain, exact = there_and_back(vae, given)
    shown, noisy = there_and_back(vae, given, noise=0.3)
    assert (noisy - exact).std().item() * vae.config.scaling_factor == pytest.approx(0.3, rel=0.05)
    torch.testing.assert_close(shown, vae.decode(noisy).sample / 2 + 0.5)
    assert not torch.allclose(shown, plain, atol=1e-3)


def test_some_opaque_pictures_are_as_the_model_paints_them(upright):
    """Without an offset; what is transparent anywhere always has one."""
    vae, pair, latents = upright(5, 1e-2)
    opaque = rgba(1).repeat(16, 1, 1, 1)
    opaque[:, 3] = 1
    nearly = opaque.clone()
    nearly[:, 3, 5, 5] = 0.5
    for pictures in (opaque, nearly):
        pair(pictures)
    painted = vae.encode(2 * opaque[:1, :3] - 1).latent_dist.mean
    without = [torch.allclose(latent, painted[0], atol=1e-5) for latent in latents[0]]
    assert 2 <= sum(without) <= 14
    of_nearly = vae.encode(2 * compose(nearly[:1], GREY) - 1).latent_dist.mean
    assert not any(torch.allclose(latent, of_nearly[0], atol=1e-5) for latent in latents[1])


def test_hidden_colour_counts_in_the_reconstruction_alone(model, tmp_path):
    trainer, _ = make(settings(model, tmp_path, 1, "--composed", "2", "--identity", "0"), Accelerator(cpu=True))
    given = rgba()
    truth = torch.cat([given[:, 3:], pad_colors(given)], dim=1)
    hidden, seen = truth.clone(), truth.clone()
    hidden[:, 1:] += 0.5 * (truth[:, :1] == 0)
    seen[:, 1:] += 0.5
    found = {}
    for name, answer in (("hidden", hidden), ("seen", seen)):
        trainer.net = lambda _, answer=answer: (truth, answer, given[:, :3], given[:, :3])
        total, found[name] = trainer.losses({"rgba": given})
        torch.testing.assert_close(total, found[name]["reconstruction"] + 2 * found[name]["composed"])
    assert found["hidden"]["reconstruction"] > 0.01 and found["hidden"]["composed"] == 0
    torch.testing.assert_close(found["seen"]["composed"], (0.5 * truth[:, :1]).square().mean())


def test_it_learns(model):
    torch.manual_seed(2)
    pair = TransparentPair(load_vae(str(model)), ENCODER, DECODER)
    optimizer = torch.optim.AdamW(pair.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        truth, answer, _, _ = pair(rgba(1))
        loss = torch.nn.functional.mse_loss(answer, truth)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert min(losses[30:]) < losses[0] / 10, losses


def test_harm_is_what_the_offset_costs(model):
    torch.manual_seed(4)
    vae = load_vae(str(model))
    pair = TransparentPair(vae, ENCODER, DECODER)
    both = TransparentVAE(pair.decoder, pair.encoder)
    untrained = measure(vae, both, rgba(1), decodes=True, passes=1)
    assert untrained["harm"] == 0
    assert untrained.keys() >= {"psnr", "ssim", "alpha mae"}
    torch.nn.init.normal_(pair.encoder.blocks[-1].weight, std=0.1)
    offset = measure(vae, both, rgba(1), decodes=False)
    assert offset["psnr without offset"] == untrained["psnr without offset"]
    assert offset["harm"] == offset["psnr without offset"] - offset["psnr with offset"] != 0


def test_harm_on_the_command_line(model, tmp_path, monkeypatch, capsys):
    train(settings(model, tmp_path, 1))
    named = {"vae": model, "data": "scenes:2", "count": 3, "size": SIZE, "passes": 1}
    named |= {part: tmp_path / f"vae_transparent_{part}.safetensors" for part in ("encoder", "decoder")}
    options = [str(word) for name, value in named.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["training.harm", *options])
    harm.main()
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"] == 3
    assert found.keys() >= {"harm", "psnr", "alpha mae"}


def test_checkpointing_changes_no_gradient(model):
    def gradients(checkpointed):
        torch.manual_seed(3)
        pair = TransparentPair(load_vae(str(model)), ENCODER, DECODER)
        torch.nn.init.normal_(pair.encoder.blocks[-1].weight, std=1e-3)
        if checkpointed:
            pair.checkpointed()
        _, answer, _, seen = pair(rgba())
        (answer.square().mean() + seen.square().mean()).backward()
        return [parameter.grad for parameter in pair.parameters()]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-4, atol=1e-6)


def test_the_critic_looks_at_patches():
    critic = patch_gan().eval()
    assert critic(torch.zeros(2, 4, 128, 64)).shape == (2, 1, 14, 6)
    picture = torch.zeros(1, 4, 256, 256, requires_grad=True)
    with torch.no_grad():
        for layer in critic:
            if isinstance(layer, torch.nn.GroupNorm):
                layer.forward = lambda x: x  # which would look at all of the picture
    critic(picture)[0, 0, 15, 15].backward()
    rows = picture.grad[0].abs().sum((0, 2)).nonzero()
    assert rows.max() - rows.min() + 1 == 70
