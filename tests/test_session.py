"""A job from request to pictures, in a host reduced to what `webui.host.Host` promises."""

import io
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from weakref import ref

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from reference import ReferenceDecoder, random_state_dict, reference_encoder
from safetensors.torch import save_file
from torch import nn

from lib_layerdiffuse.engine import loaded
from lib_layerdiffuse.engine.backend import BaseModel
from lib_layerdiffuse.engine.engine import Engine, check_family
from lib_layerdiffuse.engine.loaded import LoadedWeights
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.rgba import ResizeMode, content_hash, fit, over, over_grey, pad_colors, to_pil
from lib_layerdiffuse.injection.content import WeightPatch
from lib_layerdiffuse.methods import Family, Layer, find_method
from lib_layerdiffuse.nets.encoder import TransparentEncoder
from lib_layerdiffuse.request.layers import GREY_BACKGROUND, Request
from lib_layerdiffuse.vae import TransparentVAE
from lib_layerdiffuse.webui import outputs
from lib_layerdiffuse.webui.extension import Extension
from lib_layerdiffuse.webui.opening import open_session
from lib_layerdiffuse.webui.script_runs import ScriptRun
from lib_layerdiffuse.webui.session import Session

METHOD = find_method("sd15_transparent_attn")
LORA_KEY = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
LORA = {f"{LORA_KEY}::lora::0": torch.zeros(6, 2), f"{LORA_KEY}::lora::1": torch.zeros(2, 4)}


class Halves(nn.Module):
    """A decoder whose alpha is the mean of the latent, and whose colour is half of the pixels'."""

    def __init__(self, failures=()):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.failures = list(failures)

    def forward(self, rgb, latent):
        if self.failures:
            raise self.failures.pop(0)
        alpha = nn.functional.interpolate(latent.mean(1, keepdim=True), size=rgb.shape[2:])
        return torch.cat([alpha, rgb / 2], dim=1)


class SmallHost:
    """Samples by returning a latent; keeps account of what it was asked."""

    def __init__(self, options=(), family=Family.SD15):
        self.options = {"layerdiffuse_passes": 8, "layerdiffuse_extras": ["opaque"], "enable_pnginfo": True} | dict(
            options
        )
        self.script = ScriptRun("")
        self.family = family
        self.reports, self.injected, self.notes, self.runs, self.starts = [], [], [], [], []
        self.forgotten = []
        self.folder = None
        self.interrupted_after = None
        self.encoded = 0

    @property
    def backend(self):
        """The model too, to keep account in one place."""
        return self

    def option(self, key):
        return self.options[key]

    @contextmanager
    def progress(self):
        yield lambda text, fraction: self.reports.append(text)

    def interrupted(self):
        return self.interrupted_after is not None and len(self.reports) >= self.interrupted_after

    def base_model(self):
        return BaseModel("model", f"an {self.family.word} checkpoint", self.family)

    def inject(self, injection, weight, start, stop, condition):
        self.injected.append((injection, weight, start, stop, condition))
        return nullcontext()

    def around_sampling(self, p, owner, around, finished):
        latent = p.sample()
        with around(latent, latent):
            finished(latent)

    def posterior(self, rgb):
        self.encoded += 1
        mean = nn.functional.interpolate(rgb, scale_factor=1 / 8, mode="area")
        return mean, (1 + mean) / 100

    def sampler_latent(self, vae_latent):
        return vae_latent * 2

    def init_images(self, p):
        return p.init_images

    def set_init_images(self, p, init_images):
        p.init_images = init_images

    def init_mode(self, p):
        return p.mode

    def size(self, p):
        return p.size

    def start_from(self, p, latents):
        self.starts.append(latents)

    def fills_mask(self, p):
        return p.fills

    def latent_mask(self, p):
        return getattr(p, "cells", None)

    def mask(self, p):
        return getattr(p, "mask", None)

    def flatten_mask(self, p):
        p.flat_mask = self.mask(p)

    def only_masked(self, p):
        return p.region is not None

    def region(self, p):
        return p.region

    def overlaid(self, p, picture, overlay):
        if overlay is None:
            return picture
        left, upper, right, lower = p.region or (0, 0, *overlay.size)
        whole = Image.new("RGBA", overlay.size)
        whole.paste(picture.resize((right - left, lower - upper)), (left, upper))
        return Image.alpha_composite(whole, overlay).convert("RGB")

    def flatten_upscaled(self, p, flatten):
        pass

    def fit_batch(self, p, frames):
        p.frames = frames

    def weight_folders(self):
        return [self.folder]

    def note(self, p, text):
        self.notes.append(text)

    def refiner(self, p):
        return None

    def expect(self, p, times):
        p.times = times

    def rows(self, p):
        return p.rows

    def put_before_prompts(self, p, texts):
        p.texts = texts

    def stopping(self):
        return self.interrupted()

    def sampler(self, p):
        return "DPM++ 2M"

    def run_again(self, p, request, sampler):
        """Each picture of the run is of one colour, which tells the runs apart."""
        self.runs.append((request, sampler))
        colour = (len(self.runs),) * 3
        return SimpleNamespace(images=[Image.new("RGB", (8, 8), colour) for _ in p.rows])

    def add_runs(self, p, processed, runs):
        processed.runs = runs

    def forget(self, injection):
        self.forgotten.append(ref(injection))

    def vae_latent(self, sampler_latent):
        return sampler_latent / 2

    def places(self, module, memory):
        yield torch.device("cpu")
        yield torch.device("cpu")

    def script_run(self, p):
        return self.script

    def infotexts(self, processed):
        return [f"text {i}" for i, _ in enumerate(processed.images)]

    def show(self, p, processed, extras, frames):
        processed.extra_images.extend(extras)


def request(**changes):
    return Request.parse([{"method": METHOD.label} | changes])


def job(latents=(), rows=range(1), inits=(), **changes):
    p = SimpleNamespace(
        sample=iter(latents).__next__,
        rows=rows,
        init_images=list(inits),
        mode=ResizeMode.JUST_RESIZE,
        size=(16, 16),
        fills=False,
        region=None,
    )
    vars(p).update(changes)
    return p


def pixels(count, size=16):
    return list(torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)))


def shown(pixel):
    return Image.fromarray(outputs.host_pixels(pixel))


INJECTION = SimpleNamespace(content=WeightPatch({}, {}))


def engine(host):
    return Engine(host.backend, LoadedWeights(lambda file: host.folder / file, host.forget))


def session(host, decoder=None, injection=INJECTION, **changes):
    return Session(host, engine(host), request(**changes), injection, TransparentVAE(decoder or Halves()))


def test_every_batch_decodes_its_own_latents_in_vae_space():
    host = SmallHost()
    work = session(host)
    p = job([torch.full((2, 4, 2, 2), 0.4), torch.full((2, 4, 2, 2), 0.8)])
    alphas = []
    for batch in (pixels(2), pixels(2)):
        work.before_sampling(p)
        work.decode_batch(p, batch)
        alphas += [work.finish_picture(p, i, shown(pixel)).getpixel((3, 3))[3] for i, pixel in enumerate(batch)]
    assert alphas == [51, 51, 102, 102]  # half of the sampler's latent, in 8 bits
    assert len(work.pictures) == 4


def test_last_sampling_pass_counts():
    host = SmallHost()
    work = session(host)
    p = job([torch.zeros(1, 4, 2, 2), torch.full((1, 4, 3, 3), 1.0)])
    work.before_sampling(p)
    work.before_sampling(p)
    [pixel] = pixels(1, 24)
    work.decode_batch(p, [pixel])
    assert work.finish_picture(p, 0, shown(pixel)).size == (24, 24)


def test_injection_is_open_while_sampling():
    host = SmallHost()
    work = session(host, weight=0.5, ending_step=0.25)
    work.before_sampling(job([torch.zeros(1, 4, 2, 2)]))
    assert host.injected == [(INJECTION, 0.5, 0.0, 0.25, None)]


def test_nothing_is_injected_without_an_injection():
    host = SmallHost()
    session(host, injection=None, weight=0).before_sampling(job([torch.zeros(1, 4, 2, 2)]))
    assert host.injected == []


def test_another_checkpoint_in_the_next_pass_is_refused():
    host = SmallHost()
    work = session(host)
    host.family = Family.SDXL
    with pytest.raises(LayerDiffuseError, match=r"needs a plain SD1\.5 checkpoint, but model is an SDXL checkpoint"):
        work.before_sampling(job([torch.zeros(1, 4, 2, 2)]))


def test_interrupt_ends_decoding_after_the_pass_under_way():
    host = SmallHost()
    host.interrupted_after = 3
    work = session(host)
    p = job([torch.ones(1, 4, 2, 2)])
    work.before_sampling(p)
    work.decode_batch(p, pixels(1))
    assert len(host.reports) == 3
    assert work.finish_picture(p, 0, shown(pixels(1)[0])).mode == "RGBA"


def test_latents_that_an_interrupted_job_shows_are_left_as_they_are():
    host = SmallHost()
    host.interrupted_after = 0
    work = session(host)
    p = job([torch.ones(1, 4, 16, 16)])
    work.before_sampling(p)
    work.decode_batch(p, pixels(1, 16))
    assert work.finish_picture(p, 0, shown(pixels(1, 16)[0])).mode == "RGB"


@pytest.mark.parametrize(("failures", "succeeds"), [(4, True), (8, False)])
def test_out_of_memory_moves_on_to_a_roomier_place(failures, succeeds):
    """In each of the two places eight orientations at once are too many, and so are four, two, and one."""
    work = session(SmallHost(), Halves([torch.cuda.OutOfMemoryError("CUDA out of memory")] * failures))
    p = job([torch.ones(1, 4, 2, 2)])
    work.before_sampling(p)
    if succeeds:
        work.decode_batch(p, pixels(1))
        assert work.finish_picture(p, 0, shown(pixels(1)[0])).mode == "RGBA"
    else:
        with pytest.raises(LayerDiffuseError, match="Not enough memory for a picture of 16x16"):
            work.decode_batch(p, pixels(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_of_no_numbers_ends_the_job_instead_of_in_a_picture(value):
    work = session(SmallHost())
    p = job([torch.full((1, 4, 2, 2), value)])
    work.before_sampling(p)
    with pytest.raises(LayerDiffuseError, match="latent has values that are no numbers"):
        work.decode_batch(p, pixels(1))


@pytest.mark.parametrize(
    "make", [lambda host: starting(host, [random_image()]), lambda host: layers(host, "xl_bg2ble")]
)
def test_a_vae_that_answers_with_no_numbers_ends_the_job_before_it_samples(make):
    host = SmallHost()
    host.posterior = lambda rgb: (torch.full((1, 4, 2, 2), float("nan")), torch.zeros(1, 4, 2, 2))
    with pytest.raises(LayerDiffuseError, match="latent that the VAE made has values that are no"):
        make(host).before_sampling(job([torch.zeros(1, 4, 2, 2)]))


def test_other_errors_of_the_decoder_are_not_taken_for_memory():
    work = session(SmallHost(), Halves([RuntimeError("shape mismatch")]))
    p = job([torch.ones(1, 4, 2, 2)])
    work.before_sampling(p)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        work.decode_batch(p, pixels(1))


def test_extras_follow_by_kind_and_all_images_are_marked():
    host = SmallHost({"layerdiffuse_extras": ["mask", "opaque"]})
    work = session(host)
    p = job([torch.ones(2, 4, 2, 2)])
    batch = pixels(2)
    work.before_sampling(p)
    work.decode_batch(p, batch)
    made = [work.finish_picture(p, i, shown(pixel)) for i, pixel in enumerate(batch)]
    processed = SimpleNamespace(images=[*made, Image.new("RGB", (4, 4))], extra_images=[])
    work.finish(p, processed)
    assert [image.mode for image in processed.extra_images] == ["RGB", "RGB", "L", "L"]
    assert all(outputs.is_marked(image) for image in (*processed.images, *processed.extra_images))
    assert outputs.picture_of(made[1]) is work.pictures[1]
    texts = [f"text {i}, LayerDiffuse extra: {name}" for name in ("opaque", "mask") for i in range(2)]
    assert [outputs.infotext_of(image) for image in processed.extra_images] == texts
    assert [image.info["parameters"] for image in processed.extra_images] == texts


def test_infotexts_stay_out_of_files_where_the_settings_say_so():
    work = session(SmallHost({"enable_pnginfo": False}))
    p = job([torch.ones(1, 4, 2, 2)])
    work.before_sampling(p)
    work.decode_batch(p, pixels(1))
    processed = SimpleNamespace(images=[work.finish_picture(p, 0, shown(pixels(1)[0]))], extra_images=[])
    work.finish(p, processed)
    [opaque] = processed.extra_images
    assert "parameters" not in opaque.info
    assert outputs.infotext_of(opaque) == "text 0, LayerDiffuse extra: opaque"


def test_a_script_that_knows_no_transparency_gets_opaque_pictures():
    host = SmallHost()
    host.script = ScriptRun("SD upscale")
    work = Session(host, engine(host), request(), INJECTION, None)
    p = job([torch.ones(1, 4, 2, 2)])
    work.before_sampling(p)
    work.decode_batch(p, pixels(1))
    made = work.finish_picture(p, 0, shown(pixels(1)[0]))
    assert made.tobytes() == shown(pixels(1)[0]).tobytes()
    assert (host.starts, host.script.foregrounds) == ([], 1)


@pytest.mark.parametrize("kind", ["an SD2 checkpoint", "an SDXL refiner checkpoint", "an SD1.5 inpainting checkpoint"])
def test_checkpoints_without_weights_are_named(kind):
    with pytest.raises(LayerDiffuseError, match=rf"dreamy is {kind}\. Choose another checkpoint"):
        check_family(METHOD, BaseModel("dreamy", kind, None))


# --- layers -----------------------------------------------------------------------------------------------------

RED_GLASS = Image.new("RGBA", (16, 16), (200, 0, 0, 128))
BLUE, GREEN = Image.new("RGB", (16, 16), (0, 0, 200)), Image.new("RGB", (16, 16), (0, 200, 0))
PICTURES = {"fg_image": RED_GLASS, "bg_image": BLUE, "blend_image": GREEN}
SHARING = SimpleNamespace(content=None)  # not a weight patch


def layers(host, key, injection=INJECTION, **changes):
    """A session of a method that may need images."""
    asked = request(method=key, **PICTURES, **changes)
    host.family = asked.method.family
    if asked.method.chain:
        asked = asked.for_step(asked.method.chain[0], asked.images)
    return Session(host, engine(host), asked, injection, TransparentVAE(Halves()))


def sample(work, batches=1, rows=range(1)):
    """Run it through the host's hooks; the images shown."""
    p = job([torch.full((len(rows), 4, 2, 2), 0.8)] * batches, rows)
    made = []
    for _ in range(batches):
        batch = pixels(len(rows))
        work.before_sampling(p)
        work.decode_batch(p, batch)
        made += [work.finish_picture(p, i, shown(pixel)) for i, pixel in enumerate(batch)]
    return p, made


def test_only_foregrounds_are_decoded_and_files_are_named_after_what_they_show():
    work = layers(SmallHost(), "sd15_joint", SHARING)
    _, made = sample(work, rows=range(6))
    assert [image.mode for image in made] == ["RGBA", "RGB", "RGB"] * 2
    assert [picture.name for picture in work.pictures] == ["fg", "bg", "blend"] * 2
    assert [outputs.caption_of(image) for image in made] == ["foreground", "background", "blend"] * 2
    assert [list(picture.extras) for picture in work.pictures] == [["opaque"], [], []] * 2
    assert [work.infotext["LayerDiffuse shows"](index=i) for i in range(3)] == ["foreground", "background", "blend"]


def test_a_lone_picture_is_not_named():
    work = session(SmallHost())
    _, [image] = sample(work)
    assert (work.pictures[0].name, outputs.caption_of(image)) == ("", "")
    assert "LayerDiffuse shows" not in work.infotext


@pytest.mark.parametrize(
    ("key", "grey", "written"),
    [("sd15_transparent_attn", True, {"passes": 4, "grey background": True}), ("sd15_fg2bg", True, {}),
     ("sd15_bg2fg", False, {"passes": 4})],
)  # fmt: skip
def test_infotext_has_passes_and_grey_words_where_something_is_decoded(key, grey, written):
    work = layers(SmallHost(), key, SHARING, passes=4, grey_background=grey)
    if not work.method.makes_foreground:
        work.vae = None
    keys = ("LayerDiffuse passes", "LayerDiffuse grey background")
    assert {k: v for k, v in work.infotext.items() if k in keys} == {f"LayerDiffuse {k}": v for k, v in written.items()}


def test_infotext_has_a_hash_of_each_image_that_is_used():
    text = layers(SmallHost(), "sd15_fg2bg", SHARING).infotext
    assert text["LayerDiffuse foreground image"] == content_hash(RED_GLASS)
    assert "LayerDiffuse background image" not in text


def test_words_go_before_the_prompts_of_their_layers():
    joint, without_foreground = job(), job()
    layers(SmallHost(), "sd15_joint", SHARING, grey_background=True, bg_prompt="a desk").before_prompts(joint)
    layers(SmallHost(), "sd15_fg2bg", SHARING, grey_background=True).before_prompts(without_foreground)
    assert joint.texts == [GREY_BACKGROUND, "a desk", ""]
    assert not hasattr(without_foreground, "texts")


@pytest.mark.parametrize(
    ("key", "composed_at"),
    [
        ("sd15_joint", [False, False, True]),
        ("sd15_fg2bg", [False, True]),
        ("xl_fgble2bg", [True]),
        ("xl_fg2ble", [False]),
    ],
)
def test_foreground_over_background_goes_with_the_last_picture_that_belongs_to_them(key, composed_at):
    host = SmallHost({"layerdiffuse_extras": ["composed"]})
    work = layers(host, key)
    _, made = sample(work, rows=range(2 * len(composed_at)))
    assert ["composed" in picture.extras for picture in work.pictures] == composed_at * 2
    if key == "sd15_joint":
        assert work.pictures[5].extras["composed"].tobytes() == over(made[3], made[4]).tobytes()
    if key == "xl_fgble2bg":
        assert work.pictures[1].extras["composed"].tobytes() == over(RED_GLASS, made[1]).tobytes()


def test_condition_latents_stand_in_the_order_of_the_method_s_inputs():
    host = SmallHost()
    sample(layers(host, "xl_fgble2bg"))
    [(*_, condition)] = host.injected
    expected = torch.cat([nn.functional.interpolate(over_grey(image), (2, 2)) for image in (RED_GLASS, GREEN)], dim=1)
    torch.testing.assert_close(condition, 2 * expected)  # in sampler space


def test_attention_sharing_gets_the_picture_itself():
    host = SmallHost()
    sample(layers(host, "sd15_bg2fg", SHARING), rows=range(2))
    [(*_, condition)] = host.injected
    torch.testing.assert_close(condition, over_grey(BLUE))


def test_condition_is_encoded_once_for_each_size():
    host = SmallHost()
    work = layers(host, "xl_bg2ble")
    p = job([torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 3, 3)] * 3)
    for _ in range(6):
        work.before_sampling(p)
    assert host.encoded == 2
    assert [condition.shape[-1] for *_, condition in host.injected] == [2, 3] * 3


def test_each_picture_of_a_batch_can_have_its_own_condition():
    host = SmallHost()
    asked = request(method="xl_bgble2fg", **PICTURES)
    several = [Image.new("RGB", (16, 16), (value, 0, 0)) for value in (0, 51, 102, 255)]
    step = asked.for_step(asked.method.steps[0], dict(asked.images) | {Layer.BLEND: several})
    host.family = Family.SDXL
    work = Session(host, engine(host), step, INJECTION, TransparentVAE(Halves()))
    sample(work, rows=range(2, 4))
    [(*_, condition)] = host.injected
    assert condition.shape == (2, 6, 2, 2)
    torch.testing.assert_close(condition[:, 2, 0, 0], torch.tensor([400 / 255, 400 / 255]))  # the background's blue
    torch.testing.assert_close(condition[:, 3, 0, 0], torch.tensor([0.8, 2.0]))


def test_prompts_go_to_the_frames_they_are_for():
    p = SimpleNamespace()
    layers(SmallHost(), "sd15_joint", SHARING, bg_prompt="table", blend_prompt="apple on table").before_prompts(p)
    assert p.texts == ["", "table", "apple on table"]


def test_without_prompts_for_layers_nothing_is_put_before():
    p = SimpleNamespace()
    layers(SmallHost(), "sd15_fg2bg", SHARING, fg_prompt="of no use here").before_prompts(p)
    assert not hasattr(p, "texts")


def run_chain(host, key):
    work = layers(host, key)
    p, made = sample(work, rows=range(2))
    processed = SimpleNamespace(images=list(made), extra_images=[])
    work.finish(p, processed)
    return made, processed


def test_chain_runs_each_step_with_what_those_before_made():
    host = SmallHost()
    made, processed = run_chain(host, "xl_everything")
    requests = [asked for asked, _ in host.runs]
    assert [asked.method.key for asked in requests] == ["xl_fg2ble", "xl_fgble2bg"]
    assert [asked.ending_step for asked in requests] == [1.0, 0.5]
    assert [sampler for _, sampler in host.runs] == ["DPM++ 2M", "Euler a"]
    assert requests[0].images == {Layer.FG: made}
    assert requests[1].images == {Layer.FG: made, Layer.BLEND: processed.runs[0].images}
    assert len(processed.runs) == 2


def test_chain_from_a_background_keeps_it_for_all_pictures():
    host = SmallHost()
    made, _ = run_chain(host, "xl_bg2blefg")
    [(asked, sampler)] = host.runs
    assert (asked.method.key, sampler) == ("xl_bgble2fg", "Euler a")
    assert asked.images == {Layer.BG: (BLUE,), Layer.BLEND: made}


def test_interrupted_chain_ends_with_the_step_under_way():
    host = SmallHost()
    host.interrupted_after = 0
    made, processed = run_chain(host, "xl_everything")
    assert (host.runs, processed.runs) == ([], [])
    assert len(processed.images) == len(made)


def test_a_later_step_does_not_run_the_chain_again():
    host = SmallHost()
    asked = request(method="xl_everything")
    host.family = Family.SDXL
    step = asked.for_step(asked.method.chain[1], {Layer.FG: (RED_GLASS,)})
    work = Session(host, engine(host), step, INJECTION, None)
    p, made = sample(work)
    work.finish(p, SimpleNamespace(images=made, extra_images=[]))
    assert host.runs == []
    assert work.pictures[0].name == "blend"


# --- img2img ----------------------------------------------------------------------------------------------------

REFERENCE = reference_encoder((4, 8, 8, 8, 8, 8, 8, 8, 8, 3))
ENCODER = random_state_dict(REFERENCE, prefix="blocks.")


def encoder():
    return TransparentEncoder.from_state_dict(ENCODER)


def random_image(seed=0, size=(16, 16)):
    """Every colour under every alpha, some of them hidden."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), np.uint8)
    values[: size[1] // 2, : size[0] // 4, 3] = 0
    return Image.fromarray(values)


def plain_latents(image):
    """What SmallHost's sampler starts from, written out: of the picture over grey, and with its transparency."""
    values = np.array(image, np.float32) / 255
    color, alpha = values[..., :3], values[..., 3:]
    flat = color * alpha + 0.5 * (1 - alpha)
    mean = flat.reshape(image.height // 8, 8, image.width // 8, 8, 3).mean((1, 3))
    rgba = torch.from_numpy(values).permute(2, 0, 1)[None]
    with torch.no_grad():
        raw = REFERENCE(torch.cat([rgba[:, 3:], pad_colors(rgba)], dim=1))[0].permute(1, 2, 0).numpy()
    shifted = mean + (1 + mean) / 100 * 300 * raw
    return [torch.from_numpy(2 * latent).permute(2, 0, 1) for latent in (mean, shifted)]


def assert_starts(starts, images, transparent=True):
    expected = torch.stack([plain_latents(image)[transparent] for image in images])
    torch.testing.assert_close(starts, expected, rtol=1e-4, atol=1e-4)


def starting(host, inits, key=METHOD.key, net=None):
    asked = request(method=key, **PICTURES)
    host.family = asked.method.family
    return Session(host, engine(host), asked, None, TransparentVAE(Halves(), net or encoder()), inits)


DECODER = {key: value.contiguous() for key, value in random_state_dict(ReferenceDecoder(layers=1)).items()}


@pytest.fixture
def extension(tmp_path):
    """With small networks under the names of the released files."""
    host = SmallHost()
    host.folder = tmp_path
    save_file(DECODER, tmp_path / Family.SD15.decoder)
    save_file(ENCODER, tmp_path / Family.SD15.encoder)
    return Extension(host)


def test_weights_are_gone_before_others_are_read(extension, monkeypatch):
    """Each is up to 3.6 GB: two at a time would not fit everywhere."""
    host = extension.host
    alive = []
    forgotten = host.forgotten
    monkeypatch.setattr(loaded, "return_freed_memory", lambda: alive.append([each() for each in forgotten if each()]))
    host.family = Family.SDXL
    keys = ["xl_transparent_attn", "xl_transparent_conv"]
    save_file(DECODER, host.folder / Family.SDXL.decoder)
    for key in keys:
        save_file(LORA, host.folder / find_method(key).weights)
    for key in [keys[0], keys[0], keys[1], keys[0]]:
        assert open_session(extension.host, extension.engine, job(), request(method=key)).injection.method.key == key
    assert len(host.forgotten) == 2
    assert alive == [[], [], []]


def opened(extension, p, **changes):
    """Through the hooks up to the first sampling."""
    work = open_session(extension.host, extension.engine, p, request(weight=0, **changes))
    work.before_sampling(p)
    return work


def test_start_is_the_latent_over_grey_and_the_offset_times_the_deviation():
    host = SmallHost()
    image = random_image(size=(24, 16))
    starting(host, [image]).before_sampling(job([torch.zeros(1, 4, 2, 3)], size=image.size))
    [start] = host.starts
    assert_starts(start, [image])
    mean, shifted = plain_latents(image)
    assert (shifted - mean).abs().min() > 1e-3  # it is seen


def test_only_foregrounds_start_with_transparency():
    host = SmallHost()
    image = random_image()
    starting(host, [image], "sd15_joint").before_sampling(job([torch.zeros(6, 4, 2, 2)], range(6)))
    [start] = host.starts
    assert_starts(start[[0, 3]], [image] * 2)
    assert_starts(start[[1, 2, 4, 5]], [image] * 4, transparent=False)


def test_pictures_that_are_no_foregrounds_start_as_the_host_has_them():
    host = SmallHost()
    asked = request(method="xl_fgble2bg", **PICTURES)
    host.family = Family.SDXL
    work = Session(host, engine(host), asked, INJECTION, None, [random_image()])
    work.before_sampling(job([torch.zeros(1, 4, 2, 2)]))
    assert host.starts == []


def test_each_picture_of_a_batch_starts_from_its_own():
    host = SmallHost()
    images = [random_image(seed) for seed in range(3)]
    work = starting(host, images)
    p = job([torch.zeros(3, 4, 2, 2)] * 2)
    for p.rows in (range(3), range(3, 6)):
        work.before_sampling(p)
        assert_starts(host.starts.pop(), images)
    assert host.encoded == 3  # in the first batch


def test_one_picture_repeated_is_encoded_once(extension):
    image = random_image()
    p = job([torch.zeros(3, 4, 2, 2)], range(3), [image] * 3)
    opened(extension, p)
    [start] = extension.host.starts
    assert_starts(start, [image] * 3)
    assert extension.host.encoded == 1


def test_the_host_takes_the_mask_for_what_is_seen_of_it(extension):
    p = job([torch.zeros(1, 4, 2, 2)], range(1), [random_image()])
    p.mask = Image.new("RGBA", (16, 16))
    opened(extension, p)
    assert p.flat_mask is p.mask


def test_different_pictures_are_encoded_each(extension):
    images = [random_image(seed) for seed in range(2)]
    opened(extension, job([torch.zeros(2, 4, 2, 2)], range(2), images))
    [start] = extension.host.starts
    assert_starts(start, images)


def palette(transparent=None):
    """A file of which every second row is of the other colour."""
    image = Image.frombytes("P", (16, 16), bytes([0] * 16 + [1] * 16) * 8)
    image.putpalette([10, 200, 30, 255, 0, 0])
    file = io.BytesIO()
    image.save(file, "PNG", **({} if transparent is None else {"transparency": transparent}))
    return Image.open(file)


def with_colour_key():
    image = Image.new("RGB", (16, 16), (9, 8, 7))
    image.info["transparency"] = (9, 8, 7)
    return image


INITS = {
    "RGB": (Image.new("RGB", (16, 16), (10, 20, 30)), [(10, 20, 30, 255)] * 2),
    "RGB with a transparent colour": (with_colour_key(), [(9, 8, 7, 0)] * 2),
    "L": (Image.new("L", (16, 16), 51), [(51, 51, 51, 255)] * 2),
    "1": (Image.new("1", (16, 16), 1), [(255, 255, 255, 255)] * 2),
    "16 bits": (Image.new("I;16", (16, 16), 51 * 257), [(51, 51, 51, 255)] * 2),
    "LA": (Image.new("LA", (16, 16), (51, 102)), [(51, 51, 51, 102)] * 2),
    "P": (palette(), [(10, 200, 30, 255), (255, 0, 0, 255)]),
    "P with a transparent colour": (palette(1), [(10, 200, 30, 255), (255, 0, 0, 0)]),
    "P with alphas": (palette(bytes([255, 100])), [(10, 200, 30, 255), (255, 0, 0, 100)]),
    "RGBA": (Image.new("RGBA", (16, 16), (10, 20, 30, 40)), [(10, 20, 30, 40)] * 2),
}


@pytest.mark.parametrize(("image", "rows"), INITS.values(), ids=INITS.keys())
def test_start_from_a_picture_of_any_mode(extension, image, rows):
    p = job([torch.zeros(1, 4, 2, 2)], inits=[image])
    opened(extension, p)
    expected = Image.fromarray(np.array(rows * 8, np.uint8)[:, None].repeat(16, axis=1))
    [start] = extension.host.starts
    assert_starts(start, [expected])
    [seen] = p.init_images
    assert seen == to_pil(over_grey(expected)[0])


@pytest.mark.parametrize("mode", list(ResizeMode))
def test_start_from_a_picture_of_another_size(extension, mode):
    image = random_image(size=(40, 24))
    p = job([torch.zeros(1, 4, 2, 2)], inits=[image], mode=mode)
    opened(extension, p)
    fitted = fit(image, mode, 16, 16)
    [start] = extension.host.starts
    assert_starts(start, [fitted])
    assert p.init_images == [to_pil(over_grey(fitted)[0])]


def test_what_is_enlarged_as_latents_is_encoded_at_its_own_size_in_whole_cells(extension):
    image = random_image(size=(27, 17))
    p = job([torch.zeros(1, 4, 2, 2)], inits=[image], mode=None)
    opened(extension, p)
    [start] = extension.host.starts
    assert_starts(start, [image.crop((0, 0, 24, 16))])
    assert p.init_images[0].size == (24, 16)


def test_of_a_region_only_that_is_encoded(extension):
    image = random_image(size=(40, 32))
    p = job([torch.zeros(1, 4, 2, 2)], inits=[image], region=(9, 4, 25, 20))
    opened(extension, p)
    [start] = extension.host.starts
    assert_starts(start, [Image.fromarray(np.array(image)[4:20, 9:25])])
    assert p.init_images[0].size == image.size


def test_a_region_is_encoded_enlarged(extension):
    image = Image.new("RGBA", (20, 20), (200, 0, 0, 255))
    image.paste((0, 255, 0, 60), (5, 5, 13, 13))
    opened(extension, job([torch.zeros(1, 4, 2, 2)], inits=[image], region=(5, 5, 13, 13)))
    [start] = extension.host.starts
    assert_starts(start, [Image.new("RGBA", (16, 16), (0, 255, 0, 60))])


@pytest.mark.parametrize("hook", [True, False])
@pytest.mark.parametrize("fills", [True, False])
def test_what_is_masked_starts_from_its_surroundings_where_the_job_says_so(fills, hook):
    host = SmallHost()
    around = Image.new("RGBA", (16, 16), (200, 30, 0, 102))
    image, mask = around.copy(), Image.new("L", (16, 16), 0)
    image.paste((0, 0, 255, 255), (5, 5, 11, 11))
    mask.paste(255, (5, 5, 11, 11))
    work = starting(host, [image])
    if hook:
        work.before_inits(mask)
    work.before_sampling(job([torch.zeros(1, 4, 2, 2)], fills=fills, cells=None if hook else mask))
    [start] = host.starts
    assert_starts(start, [around if fills else image])


def test_networks_are_read_once_and_the_encoder_for_img2img_only(extension):
    (extension.host.folder / Family.SD15.encoder).rename(extension.host.folder / "later")
    without = opened(extension, job([torch.zeros(1, 4, 2, 2)]))
    (extension.host.folder / "later").rename(extension.host.folder / Family.SD15.encoder)
    first, second = (opened(extension, job([torch.zeros(1, 4, 2, 2)], inits=[random_image()])) for _ in range(2))
    assert without.vae.encoder is None
    assert without.vae.decoder is first.vae.decoder is second.vae.decoder
    assert first.vae.encoder is second.vae.encoder


def test_a_file_that_is_no_encoder_is_named(extension):
    path = extension.host.folder / Family.SD15.encoder
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(LayerDiffuseError, match=rf"{path.name} is not a transparent encoder: .*Delete it"):
        open_session(extension.host, extension.engine, job(inits=[random_image()]), request(weight=0))


@pytest.mark.parametrize(("failures", "succeeds"), [(1, True), (2, False)])
def test_out_of_memory_moves_the_encoder_on_to_a_roomier_place(failures, succeeds):
    class Cramped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.failures = encoder(), failures

        def forward(self, argb):
            self.failures -= 1
            if self.failures >= 0:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory")
            return self.net(argb)

    host = SmallHost()
    image = random_image()
    work = starting(host, [image], net=Cramped())
    p = job([torch.zeros(1, 4, 2, 2)])
    if succeeds:
        work.before_sampling(p)
        assert_starts(host.starts[0], [image])
    else:
        with pytest.raises(LayerDiffuseError, match="Not enough memory for a picture of 16x16"):
            work.before_sampling(p)


# --- inpainting -------------------------------------------------------------------------------------------------


def test_what_a_sampling_became_since_is_decoded():
    work = session(SmallHost())
    p = job([torch.zeros(1, 4, 2, 2)])
    batch = pixels(1)
    work.before_sampling(p)
    work.sampled(torch.full((1, 4, 2, 2), 0.8))
    work.decode_batch(p, batch)
    assert work.finish_picture(p, 0, shown(batch[0])).getchannel("A").getextrema() == (102, 102)


def overlay_of(image, mask):
    """What hosts put over a sampled picture: the original as they know it, opaque where it is not masked."""
    overlay = image.convert("RGB")
    overlay.putalpha(ImageOps.invert(mask))
    return overlay


def box_mask(size, box):
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def inpaint(work, p, masks, edit=lambda image: None):
    """A batch through the host's hooks after sampling; what the decoder made, and what is shown of it."""
    batch = pixels(len(masks))
    work.before_sampling(p)
    work.decode_batch(p, batch)
    made = []
    for index, (pixel, mask) in enumerate(zip(batch, masks)):
        overlay = mask and overlay_of(work.inits[index % len(work.inits)], mask)
        work.before_overlay(index, overlay)
        picture = work.host.overlaid(p, shown(pixel), overlay)
        edit(picture)
        made.append(work.finish_picture(p, index, picture))
    return [to_pil(torch.cat([pixel / 2, torch.full((1, 16, 16), 0.4)])) for pixel in batch], made


LATENT = torch.full((1, 4, 2, 2), 0.8)  # alpha 0.4


def test_what_is_not_masked_is_the_original_and_the_rest_the_decoder_s():
    inits = [random_image(seed) for seed in range(2)]
    masks = [box_mask((16, 16), box) for box in ((3, 2, 9, 12), (0, 0, 16, 5))]
    work = starting(SmallHost(), inits)
    decoded, made = inpaint(work, job([LATENT.repeat(2, 1, 1, 1)], range(2)), masks)
    for before, after, mask, image in zip(inits, decoded, masks, made):
        assert image.tobytes() == Image.composite(after, before, mask).tobytes()  # hidden colours too


def test_a_later_batch_has_its_own_overlays():
    init, mask = random_image(), box_mask((16, 16), (3, 2, 9, 12))
    work = starting(SmallHost(), [init])
    p = job([LATENT] * 2)
    inpaint(work, p, [mask])
    decoded, made = inpaint(work, p, [None])
    assert made[0].tobytes() == decoded[0].tobytes()


def test_a_soft_mask_mixes_the_original_with_the_decoder_s_picture():
    init = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    mask = Image.linear_gradient("L").resize((16, 16))
    decoded, made = inpaint(starting(SmallHost(), [init]), job([LATENT]), [mask])
    np.testing.assert_allclose(np.array(made[0])[..., 3], np.array(mask) * 0.4, atol=0.51)
    inner = np.array(mask) > 0
    np.testing.assert_allclose(  # no darker for the black that is hidden
        np.array(made[0])[inner, :3].astype(int), np.array(decoded[0])[inner, :3], atol=1
    )


PAINTED, OFF_GREY = (120, 130, 140), (109, 134, 159, 102)  # what others paint over grey, and it without, at this alpha


def test_what_others_paint_is_taken_off_the_grey_with_the_decoder_s_alpha():
    init, mask = random_image(), box_mask((16, 16), (3, 2, 9, 12))

    def edit(image):
        image.paste(PAINTED, (2, 5, 7, 8))  # over the edge of the mask

    [decoded], [image] = inpaint(starting(SmallHost(), [init]), job([LATENT]), [mask], edit)
    decoded.paste(OFF_GREY, (3, 5, 7, 8))
    assert image.tobytes() == Image.composite(decoded, init, mask).tobytes()


@pytest.mark.parametrize("edited", [False, True])
def test_a_region_goes_back_to_its_place(edited):
    init, region = random_image(size=(40, 32)), (9, 4, 25, 20)
    mask = box_mask(init.size, (12, 6, 20, 18))
    p = job([LATENT], region=region)

    def edit(image):
        if edited:
            image.putpixel((14, 9), PAINTED)

    [decoded], [image] = inpaint(starting(SmallHost(), [init]), p, [mask], edit)
    if edited:
        decoded.putpixel((14 - 9, 9 - 4), OFF_GREY)
    expected = np.array(init)
    expected[6:18, 12:20] = np.array(decoded)[6 - 4 : 18 - 4, 12 - 9 : 20 - 9]
    np.testing.assert_array_equal(np.array(image), expected)


def test_a_region_that_was_sampled_enlarged_is_made_small_again():
    init, region = random_image(size=(40, 32)), (8, 4, 16, 12)
    mask = box_mask(init.size, (9, 5, 15, 11))
    work = starting(SmallHost(), [init])
    p = job([LATENT], region=region)
    pixel = torch.tensor([0.8, 0.4, 0.2])[:, None, None].expand(3, 16, 16)
    work.before_sampling(p)
    work.decode_batch(p, [pixel])
    overlay = overlay_of(init, mask)
    work.before_overlay(0, overlay)
    image = work.finish_picture(p, 0, work.host.overlaid(p, shown(pixel), overlay))
    expected = np.array(init)
    expected[5:11, 9:15] = 102, 51, 26, 102
    np.testing.assert_allclose(np.array(image).astype(int)[5:11, 9:15], expected[5:11, 9:15], atol=1)
    outside = np.array(mask) == 0
    np.testing.assert_array_equal(np.array(image)[outside], expected[outside])


def test_a_picture_enlarged_since_has_no_original_at_its_size():
    init, mask = random_image(), box_mask((16, 16), (3, 2, 9, 12))
    work = starting(SmallHost(), [init])
    p = job([LATENT])
    work.before_sampling(p)
    work.decode_batch(p, pixels(1))
    work.before_overlay(0, overlay_of(init, mask))
    image = work.finish_picture(p, 0, Image.new("RGB", (32, 32), PAINTED))
    assert image.getcolors() == [(32 * 32, OFF_GREY)]


@pytest.mark.parametrize(("value", "said"), [(2.0, "came out opaque"), (1.0, None), (0.0, "came out empty")])
def test_a_picture_without_a_subject_or_without_transparency_is_noted(value, said):
    host = SmallHost()
    work = session(host)
    p = job([torch.full((1, 4, 2, 2), value)])
    work.before_sampling(p)
    [pixel] = pixels(1)
    work.decode_batch(p, [pixel])
    work.finish_picture(p, 0, shown(pixel))
    assert [said in note for note in host.notes] == ([True] if said else [])
