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
from lib_layerdiffuse.methods import Family, find_method
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
        self.reports, self.injected = [], []
        self.interrupted_after = None

    def option(self, key):
        return self.options[key]

    @contextmanager
    def progress(self):
        yield lambda text, fraction: self.reports.append(text)

    def interrupted(self):
        return self.interrupted_after is not None and len(self.reports) >= self.interrupted_after

    def base_model(self, p):
        return BaseModel("model", f"an {self.family.word} checkpoint", self.family)

    def inject(self, p, injection, weight, ending_step):
        self.injected.append((injection, weight, ending_step))
        return nullcontext()

    def around_sampling(self, p, injected, finished):
        with injected():
            latent = p.sample()
        finished(latent)

    def vae_latent(self, p, sampler_latent):
        return sampler_latent / 2

    def places(self, module, memory):
        yield torch.device("cpu")
        yield torch.device("cpu")

    def show(self, p, processed, extras):
        processed.extra_images.extend(extras)


def request(**changes):
    return Request.parse([{"method": METHOD.label} | changes])


def job(latents):
    return SimpleNamespace(sample=iter(latents).__next__)


def pixels(count, size=16):
    return list(torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)))


def shown(pixel):
    return Image.fromarray(outputs.host_pixels(pixel))


def session(host, decoder=None, injection="injected", **changes):
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
    injection = object()
    session(host, injection=injection, weight=0.5, ending_step=0.25).before_sampling(job([torch.zeros(1, 4, 2, 2)]))
    assert host.injected == [(injection, 0.5, 0.25)]


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
    assert opaque(outputs.mark(rgba, outputs.make_picture(rgba, painted, []))) is painted


def test_transparent_init_image_is_refused():
    with pytest.raises(LayerDiffuseError, match="transparency"):
        opaque(Image.new("RGBA", (4, 4)))
