"""A job from request to pictures, in a host reduced to what `hosts.base.Host` promises."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from lib_layerdiffuse import outputs
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.hosts.base import BaseModel
from lib_layerdiffuse.images import over, over_grey
from lib_layerdiffuse.injection import WeightPatch
from lib_layerdiffuse.methods import Family, Layer, find_method
from lib_layerdiffuse.request import Request
from lib_layerdiffuse.session import Session, check_family, opaque
from lib_layerdiffuse.vae import TransparentVAE

METHOD = find_method("sd15_transparent_attn")


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
        self.options = {"layerdiffuse_passes": 8, "layerdiffuse_extras": ["opaque"]} | dict(options)
        self.family = family
        self.reports, self.injected, self.notes, self.runs = [], [], [], []
        self.interrupted_after = None
        self.encoded = 0

    def option(self, key):
        return self.options[key]

    @contextmanager
    def progress(self):
        yield lambda text, fraction: self.reports.append(text)

    def interrupted(self):
        return self.interrupted_after is not None and len(self.reports) >= self.interrupted_after

    def base_model(self, p):
        return BaseModel("model", f"an {self.family.word} checkpoint", self.family)

    def inject(self, p, injection, request, condition):
        self.injected.append((injection, request, condition))
        return nullcontext()

    def around_sampling(self, p, injected, finished):
        latent = p.sample()
        height, width = (8 * side for side in latent.shape[2:])
        with injected(width, height):
            finished(latent)

    def encode(self, p, rgb):
        self.encoded += 1
        return nn.functional.interpolate(rgb, scale_factor=1 / 8, mode="area")

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

    def vae_latent(self, p, sampler_latent):
        return sampler_latent / 2

    def places(self, module, memory):
        yield torch.device("cpu")
        yield torch.device("cpu")

    def show(self, p, processed, extras, frames):
        processed.extra_images.extend(extras)


def request(**changes):
    return Request.parse([{"method": METHOD.label} | changes])


def job(latents):
    return SimpleNamespace(sample=iter(latents).__next__)


def pixels(count, size=16):
    return list(torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)))


def shown(pixel):
    return Image.fromarray(outputs.host_pixels(pixel))


INJECTION = SimpleNamespace(content=WeightPatch({}, {}))


def session(host, decoder=None, injection=INJECTION, **changes):
    return Session(host, request(**changes), injection, TransparentVAE(decoder or Halves()))


def test_every_batch_decodes_its_own_latents_in_vae_space():
    host = SmallHost()
    work = session(host)
    p = job([torch.full((2, 4, 2, 2), 0.4), torch.full((2, 4, 2, 2), 0.8)])
    alphas = []
    for batch in (pixels(2), pixels(2)):
        work.before_sampling(p)
        work.decode_batch(p, batch)
        alphas += [work.finish_picture(i, shown(pixel)).getpixel((3, 3))[3] for i, pixel in enumerate(batch)]
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
    assert work.finish_picture(0, shown(pixel)).size == (24, 24)


def test_injection_is_open_while_sampling():
    host = SmallHost()
    work = session(host, weight=0.5, ending_step=0.25)
    work.before_sampling(job([torch.zeros(1, 4, 2, 2)]))
    assert host.injected == [(INJECTION, work.request, None)]


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
    assert work.finish_picture(0, shown(pixels(1)[0])).mode == "RGBA"


@pytest.mark.parametrize(("failures", "succeeds"), [(1, True), (2, False)])
def test_out_of_memory_moves_on_to_a_roomier_place(failures, succeeds):
    work = session(SmallHost(), Halves([torch.cuda.OutOfMemoryError("CUDA out of memory")] * failures))
    p = job([torch.ones(1, 4, 2, 2)])
    work.before_sampling(p)
    if succeeds:
        work.decode_batch(p, pixels(1))
        assert work.finish_picture(0, shown(pixels(1)[0])).mode == "RGBA"
    else:
        with pytest.raises(LayerDiffuseError, match="Not enough memory to decode a picture of 16x16"):
            work.decode_batch(p, pixels(1))


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
    made = [work.finish_picture(i, shown(pixel)) for i, pixel in enumerate(batch)]
    processed = SimpleNamespace(images=[*made, Image.new("RGB", (4, 4))], extra_images=[])
    work.finish(p, processed)
    assert [image.mode for image in processed.extra_images] == ["RGB", "RGB", "L", "L"]
    assert all(outputs.is_marked(image) for image in (*processed.images, *processed.extra_images))
    assert outputs.picture_of(made[1]) is work.pictures[1]


@pytest.mark.parametrize("kind", ["an SD2 checkpoint", "an SDXL refiner checkpoint", "an SD1.5 inpainting checkpoint"])
def test_checkpoints_without_weights_are_named(kind):
    with pytest.raises(LayerDiffuseError, match=rf"dreamy is {kind}\. Choose another checkpoint"):
        check_family(METHOD, BaseModel("dreamy", kind, None))


def test_opaque_init_images_are_taken_as_they_are():
    for image in (Image.new("RGB", (4, 4)), Image.new("RGBA", (4, 4), (0, 0, 0, 255))):
        assert opaque(image) is image


def test_own_picture_starts_from_the_opaque_one_beside_it():
    rgba, painted = Image.new("RGBA", (4, 4)), Image.new("RGB", (4, 4))
    assert opaque(outputs.mark(rgba, outputs.Picture(painted, {}))) is painted


def test_transparent_init_image_is_refused():
    with pytest.raises(LayerDiffuseError, match="transparency"):
        opaque(Image.new("RGBA", (4, 4)))


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
    return Session(host, asked, injection, TransparentVAE(Halves()))


def sample(work, batches=1, rows=range(1)):
    """Run it through the host's hooks; the images shown."""
    p = job([torch.full((len(rows), 4, 2, 2), 0.8)] * batches)
    p.rows = rows
    made = []
    for _ in range(batches):
        batch = pixels(len(rows))
        work.before_sampling(p)
        work.decode_batch(p, batch)
        made += [work.finish_picture(i, shown(pixel)) for i, pixel in enumerate(batch)]
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
    [(_, _, condition)] = host.injected
    expected = torch.cat([nn.functional.interpolate(over_grey(image), (2, 2)) for image in (RED_GLASS, GREEN)], dim=1)
    torch.testing.assert_close(condition, expected)


def test_attention_sharing_gets_the_picture_itself():
    host = SmallHost()
    sample(layers(host, "sd15_bg2fg", SHARING), rows=range(2))
    [(_, _, condition)] = host.injected
    torch.testing.assert_close(condition, over_grey(BLUE))


def test_condition_is_encoded_once_for_each_size():
    host = SmallHost()
    work = layers(host, "xl_bg2ble")
    p = job([torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 3, 3)] * 3)
    for _ in range(6):
        work.before_sampling(p)
    assert host.encoded == 2
    assert [condition.shape[-1] for _, _, condition in host.injected] == [2, 3] * 3


def test_each_picture_of_a_batch_can_have_its_own_condition():
    host = SmallHost()
    asked = request(method="xl_bgble2fg", **PICTURES)
    several = [Image.new("RGB", (16, 16), (value, 0, 0)) for value in (0, 51, 102, 255)]
    step = asked.for_step(asked.method.steps[0], dict(asked.images) | {Layer.BLEND: several})
    host.family = Family.SDXL
    work = Session(host, step, INJECTION, TransparentVAE(Halves()))
    sample(work, rows=range(2, 4))
    [(_, _, condition)] = host.injected
    assert condition.shape == (2, 6, 2, 2)
    torch.testing.assert_close(condition[:, 2, 0, 0], torch.tensor([200 / 255, 200 / 255]))  # the background's blue
    torch.testing.assert_close(condition[:, 3, 0, 0], torch.tensor([0.4, 1.0]))


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
    work = Session(host, step, INJECTION, None)
    p, made = sample(work)
    work.finish(p, SimpleNamespace(images=made, extra_images=[]))
    assert host.runs == []
    assert work.pictures[0].name == "blend"
