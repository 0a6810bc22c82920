"""What is injected into UNets of diffusers, and what is trained in them: the tiny world's, with random weights."""

from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import EulerDiscreteScheduler
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from peft import LoraConfig
from safetensors.torch import load_file

from lib_layerdiffuse.engine.diffusers import DiffusersBackend, Sampling, checkpoint_keys
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.injection.content import load_injection
from lib_layerdiffuse.methods import METHODS, Family, find_method
from training.injection import KINDS, InjectionSettings, start_from
from training.tiny.models import MAKERS, TOKENS, make_tokenizer, make_vae
from training.trainer import save_halves

SIDE = 8  # of latents
TRAINABLE = [method for method in METHODS if not method.chain]


@pytest.fixture(scope="module", autouse=True)
def _process_of_its_own():
    """As far as accelerate knows."""
    AcceleratorState._reset_state(reset_partial_state=True)


def pipeline_of(family):
    torch.manual_seed(0)
    return MAKERS[family](make_vae())


def settings(method):
    return InjectionSettings(data="", output="", model="", method=method.key, rank=4, signal=8)


def untrained(method, pipeline):
    pipeline.unet.requires_grad_(False)
    return KINDS[method.key](pipeline.unet, settings(method), method).eval()


def trained(method, pipeline):
    """A network in training whose weights are random, as if it had learnt something."""
    net = untrained(method, pipeline)
    for weight in net.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)
    return net


def inputs(method, pipeline, pictures=2):
    unet, rows = pipeline.unet, pictures * method.frames
    torch.manual_seed(1)
    context = torch.randn(rows, 7, unet.config.cross_attention_dim)
    added = None
    if method.family is Family.SDXL:
        added = {
            "text_embeds": torch.randn(rows, pipeline.text_encoder_2.config.projection_dim),
            "time_ids": torch.ones(rows, 6),
        }
    condition = torch.zeros(pictures, 0)
    if method.inputs:
        latents = torch.randn(pictures, 4 * len(method.inputs), SIDE, SIDE)
        condition = latents if method.family is Family.SDXL else torch.rand(pictures, 3, 8 * SIDE, 8 * SIDE)
    return torch.randn(rows, 4, SIDE, SIDE), torch.full((rows,), 500), context, added, condition


def answer(unet, given):
    noisy, timesteps, context, added, _ = given
    with torch.no_grad():
        return unet(noisy, timesteps, context, added_cond_kwargs=added).sample


@pytest.mark.parametrize("family", Family)
def test_the_names_in_checkpoints_are_those_that_diffusers_converts(family):
    unet = pipeline_of(family).unet
    checkpoint = {
        f"model.{key}": weight for (_, weight), key in zip(unet.named_parameters(), checkpoint_keys(unet).values())
    }
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    own = dict(unet.named_parameters())
    assert converted.keys() == own.keys() == checkpoint_keys(unet).keys()
    assert all(converted[name] is own[name] for name in own)


@pytest.mark.parametrize("method", TRAINABLE, ids=lambda method: method.key)
def test_what_was_trained_is_what_is_injected(method, tmp_path):
    """The file of each method, read and injected as users do, makes the UNet answer as the trained network does."""
    pipeline = pipeline_of(method.family)
    given = inputs(method, pipeline)
    plain = answer(pipeline.unet, given)
    net = trained(method, pipeline)
    for weight in net.tensors().values():
        weight.data = weight.data.half().float()  # as the file has them
    save_halves(net.tensors(), tmp_path / method.weights)
    with torch.no_grad():
        expected = net(*given)
    assert (expected - plain).abs().mean() > 0.05 * plain.abs().mean(), "nothing was added that could be missing"

    host = DiffusersBackend(pipeline_of(method.family))
    injection = load_injection(method, tmp_path / method.weights)
    before = {name: weight.clone() for name, weight in host.unet.named_parameters()}
    condition = given[-1] if method.inputs else None
    with host.inject(injection, 1.0, 0.0, 1.0, condition):
        found = answer(host.unet, given)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())
    assert all(torch.equal(before[name], weight) for name, weight in host.unet.named_parameters())
    assert torch.equal(answer(host.unet, given), plain)


@pytest.mark.parametrize("method", TRAINABLE, ids=lambda method: method.key)
def test_training_goes_on_from_what_was_trained(method, tmp_path):
    file = tmp_path / method.weights
    save_halves(trained(method, pipeline_of(method.family)).tensors(), file)
    net = untrained(method, pipeline_of(method.family))
    start_from(net, file, method, rank=4)
    expected, found = load_file(file), net.tensors()
    assert found.keys() == expected.keys()
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("key", "up", "down"), [("sd15_joint", ".up.", ".down."), ("xl_transparent_attn", "::0", "::1")]
)
def test_a_higher_rank_is_cut_to_what_comes_nearest(key, up, down, tmp_path):
    """Here a lower rank in disguise, of which nothing is lost."""
    method = find_method(key)
    before = trained(method, pipeline_of(method.family)).tensors()
    twice = {name: torch.cat([x, x], 1) / 2 if up in name else x for name, x in before.items()}
    twice = {name: torch.cat([x, x]) if down in name else x for name, x in twice.items()}
    torch.manual_seed(1)
    turn = torch.linalg.qr(torch.randn(8, 8)).Q
    twice = {name: x @ turn if up in name else turn.T @ x if down in name else x for name, x in twice.items()}
    save_halves(twice, tmp_path / method.weights)
    net = untrained(method, pipeline_of(method.family))
    start_from(net, tmp_path / method.weights, method, rank=4)
    found = net.tensors()
    for name in before:
        if up in name:
            expected, product = (each[name] @ each[name.replace(up, down)] for each in (before, found))
            torch.testing.assert_close(product, expected, rtol=0, atol=2e-3 * expected.abs().max().item())


def test_weights_of_a_lower_rank_are_not_gone_on_from(tmp_path):
    method = find_method("sd15_joint")
    net = untrained(method, pipeline_of(method.family))
    tensors = {key: x[:2] if "lora.0.down" in key else x for key, x in net.tensors().items()}
    save_halves(tensors, tmp_path / method.weights)
    with pytest.raises(SystemExit, match=r"lora\.0\.down\.weight is \(4, \d+\), in the file it is \(2, \d+\)"):
        start_from(net, tmp_path / method.weights, method, rank=4)


@pytest.mark.parametrize("key", ["sd15_fg2bg", "xl_transparent_attn", "xl_bgble2fg"])
def test_weight_and_span(key, tmp_path):
    method = find_method(key)
    pipeline = pipeline_of(method.family)
    given = inputs(method, pipeline)
    save_halves(trained(method, pipeline).tensors(), tmp_path / method.weights)
    host = DiffusersBackend(pipeline_of(method.family))
    plain = answer(host.unet, given)
    injection = load_injection(method, tmp_path / method.weights)
    condition = given[-1] if method.inputs else None

    def with_span(weight, start, stop, timestep):
        with host.inject(injection, weight, start, stop, condition):
            return answer(host.unet, (given[0], torch.full_like(given[1], timestep), *given[2:]))

    torch.testing.assert_close(with_span(0.0, 0, 1, 500), plain, rtol=1e-4, atol=1e-5)
    whole, half = with_span(1.0, 0, 1, 500), with_span(0.5, 0, 1, 500)
    assert (half - plain).abs().mean() < (whole - plain).abs().mean()
    assert not torch.equal(
        with_span(1.0, 0, 0.4, 700), answer(host.unet, (given[0], torch.full_like(given[1], 700), *given[2:]))
    )
    assert torch.equal(with_span(1.0, 0, 0.4, 500), plain), "it goes on after its end"
    assert torch.equal(with_span(1.0, 0.6, 1, 500), plain), "it begins too early"
    assert torch.equal(with_span(1.0, 0.4, 1, 500), whole)


def test_weights_of_another_unet_are_refused_before_anything_changes(tmp_path):
    method = find_method("xl_transparent_conv")
    pipeline = pipeline_of(method.family)
    tensors = dict(trained(method, pipeline).tensors())
    key = next(key for key in tensors if key.endswith("out.2.weight::diff::0"))
    tensors[key] = tensors[key][:2]
    save_halves(tensors, tmp_path / method.weights)
    host = DiffusersBackend(pipeline_of(method.family))
    injection = load_injection(method, tmp_path / method.weights)
    injected = host.inject(injection, 1.0, 0.0, 1.0, None)
    with pytest.raises(LayerDiffuseError, match=r"out\.2\.weight .*UNet \(4, 32, 3, 3\)"), injected:
        pass


@pytest.mark.parametrize(("method", "other", "reason"), [
    ("xl_transparent_attn", "sd15_transparent_attn", "shares attention between layers of SD1.5"),
    ("sd15_transparent_attn", "xl_transparent_attn", "additions do not fit this UNet"),
])  # fmt: skip
def test_a_file_of_the_other_kind_is_refused(tmp_path, method, other, reason):
    method, other = find_method(method), find_method(other)
    save_halves(dict(trained(other, pipeline_of(other.family)).tensors()), tmp_path / method.weights)
    injection = load_injection(method, tmp_path / method.weights)
    injected = DiffusersBackend(pipeline_of(method.family)).inject(injection, 1.0, 0.0, 1.0, None)
    with pytest.raises(LayerDiffuseError, match=f"is not the weight file of .*{reason}"), injected:
        pass


def test_the_vae_is_in_single_precision_whatever_the_unet_is():
    pipeline = pipeline_of(Family.SDXL)
    pipeline.to(torch.bfloat16)
    host = DiffusersBackend(pipeline)
    assert host.unet.dtype == torch.bfloat16
    rgb = torch.rand(1, 3, 64, 64)
    mean, deviation = host.posterior(rgb)
    expected = pipeline.vae.float().encode(2 * rgb - 1).latent_dist
    assert torch.equal(mean, expected.mean)
    assert torch.equal(deviation, expected.std)


def test_models_that_are_not_there_or_of_the_other_family(tmp_path):
    with pytest.raises(LayerDiffuseError, match="nowhere cannot be loaded: there is no such file"):
        DiffusersBackend.load(tmp_path / "nowhere", Family.SD15)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(LayerDiffuseError, match=r"no plain SD1\.5 or SDXL checkpoint"):
        DiffusersBackend.load(tmp_path / "model.safetensors", Family.SD15)
    pipeline_of(Family.SD15).save_pretrained(tmp_path / "sd15")
    assert DiffusersBackend.load(tmp_path / "sd15", Family.SD15).usual_size == 128
    with pytest.raises(LayerDiffuseError, match="StableDiffusionPipeline, but this needs SDXL"):
        DiffusersBackend.load(tmp_path / "sd15", Family.SDXL)


def test_seeds_are_of_each_picture():
    host = DiffusersBackend(pipeline_of(Family.SD15))
    host.pipeline.set_progress_bar_config(disable=True)
    sampling = Sampling(["a red disc"] * 2, [5, 6], "", 64, 64, 2, 1.0, "Euler")
    both = host.sample(sampling)
    torch.testing.assert_close(
        host.sample(replace(sampling, prompts=["a red disc"], seeds=[6])), both[1:], rtol=1e-3, atol=1e-3
    )
    assert not torch.equal(both[0], both[1])


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "DDIM"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_what_is_held_stays_as_it_was(sampler, prediction):
    host = DiffusersBackend(pipeline_of(Family.SDXL))
    host.pipeline.set_progress_bar_config(disable=True)
    host.pipeline.scheduler.register_to_config(prediction_type=prediction)
    sampling = Sampling(["a red disc"] * 2, [5, 6], "", 64, 64, 6, 3.0, sampler)
    original, noise = torch.randn(2, 2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(2)).unbind()
    left = torch.zeros(2, 1, SIDE, SIDE, dtype=torch.bool)
    left[..., : SIDE // 2] = True
    sigmas = []
    alone = host.sample(sampling)
    with host.hold(original, noise, lambda sigma: sigmas.append(sigma) or left):
        made = host.sample(sampling)
    torch.testing.assert_close(made[..., SIDE // 2 :], original[..., SIDE // 2 :], rtol=0, atol=5e-3)
    assert (made - original)[..., : SIDE // 2].abs().mean() > 0.1
    with host.hold(original, noise, lambda sigma: torch.ones_like(left)):
        assert torch.equal(host.sample(sampling), alone)
    assert torch.equal(host.sample(sampling), alone)
    expected = EulerDiscreteScheduler.from_config(host.pipeline.scheduler.config)
    expected.set_timesteps(6)
    if sampler == "Euler":
        torch.testing.assert_close(torch.tensor(sigmas), expected.sigmas[:-1].cpu(), rtol=1e-3, atol=1e-3)


def test_a_lora_of_peft_does_not_hide_the_weights_that_it_is_on():
    plain, wrapped = pipeline_of(Family.SDXL).unet, pipeline_of(Family.SDXL).unet
    keys = list(checkpoint_keys(plain).values())
    wrapped.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"]))
    assert list(checkpoint_keys(wrapped).values()) == keys
    with torch.no_grad():
        for name, key in checkpoint_keys(wrapped).items():
            torch.testing.assert_close(wrapped.get_parameter(name), dict(zip(keys, plain.parameters()))[key])


@pytest.mark.parametrize("family", Family)
def test_words_are_read_as_diffusers_reads_them(family):
    host = DiffusersBackend(pipeline_of(family))
    host.pipeline.set_progress_bar_config(disable=True)
    prompts, negative = ["a red disc", "a blue star, at the left"], "grey"
    found = host.sample(Sampling(prompts, [5, 6], negative, 64, 64, 2, 3.0, "Euler"))
    expected = host.pipeline(
        prompt=prompts,
        negative_prompt=[negative] * 2,
        width=64,
        height=64,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        output_type="latent",
    )
    assert torch.equal(found, expected.images)


@pytest.mark.parametrize("family", Family)
def test_long_words_are_read_in_chunks(family):
    """Of 38 tokens here, each with its start and end; what is shorter is filled up with empty ones."""
    host = DiffusersBackend(pipeline_of(family))
    parts = ["a red disc " * 12 + "a red", "disc " + "a blue star " * 12 + "at", "the left"]
    whole = host.embeddings([" ".join(parts), "a ring"], "")
    each = [host.embeddings([part, other], "") for part, other in zip(parts, ["a ring", "", ""])]
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        torch.testing.assert_close(whole[name], torch.cat([one[name] for one in each], dim=1))
        assert whole[name].shape[:2] == (2, 3 * TOKENS)
    for name in whole.keys() - {"prompt_embeds", "negative_prompt_embeds"}:
        torch.testing.assert_close(whole[name], each[0][name])
    assert len(whole) == (4 if family is Family.SDXL else 2)


def test_the_tokenizer_knows_its_words_and_spells_others():
    tokenizer = make_tokenizer()
    known = tokenizer.tokenize("a hairy purple triangle at the bottom right over a striped red and blue background")
    assert len(known) == 15
    assert tokenizer.unk_token not in tokenizer.tokenize("Zebra!")
    assert tokenizer(["a"], padding="max_length").input_ids[0][0] == tokenizer.bos_token_id
