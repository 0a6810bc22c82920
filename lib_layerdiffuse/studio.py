"""Jobs without a web UI: a request, prompts and seeds go in, pictures come out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import ceil, isfinite
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.hosts.diffusers import SAMPLERS, DiffusersHost, Sampling
from lib_layerdiffuse.images import GREY, ResizeMode, compose, fit, from_pil, over_grey, to_pil
from lib_layerdiffuse.injection import Injection, WeightPatch, load_injection
from lib_layerdiffuse.methods import DECODERS, ENCODERS, Layer, find_method, shortened
from lib_layerdiffuse.nets.decoder import TransparentDecoder
from lib_layerdiffuse.nets.encoder import TransparentEncoder
from lib_layerdiffuse.notes import sampler_for
from lib_layerdiffuse.reading import MAX_PIXELS
from lib_layerdiffuse.request import Request
from lib_layerdiffuse.tensors import Latent, Rgb, Rgba
from lib_layerdiffuse.vae import LATENT_STRIDE, PASSES, TransparentVAE, check_encoded, check_painted
from lib_layerdiffuse.weights import read_tensors

MOST_PASSES = max(PASSES)
SMALLEST = 64  # pixels of a side
MOST_STEPS = 1000  # as many noise levels as the models know
SEEDS = 2**64  # of torch


@dataclass(frozen=True)
class Job:
    """What is sampled, apart from what LayerDiffuse does."""

    prompt: str
    negative: str = ""
    seed: int = 0  # of the first picture; those of all others run on from it
    count: int = 1
    width: int = 0  # in pixels; 0: what the model is used to
    height: int = 0
    steps: int = 25
    cfg: float = 7.0
    sampler: str = "Euler a"
    inits: Sequence[Image.Image] = ()  # img2img: what the pictures start from, in turn
    strength: float = 0.75  # of img2img


@dataclass(frozen=True)
class Made:
    """A picture, what it shows (None without LayerDiffuse), and the latent that it came from."""

    image: Image.Image  # RGBA where it is a foreground, else RGB
    opaque: Image.Image  # what the model's own VAE shows of it
    layer: Layer | None
    latent: Latent  # of this picture alone
    seed: int


class Studio:
    """A model with the weights that go with it; keeps what it has read.

    obtain: the path of a weight file, by its name.
    """

    def __init__(self, host: DiffusersHost, obtain: Callable[[str], Path]) -> None:
        self.host = host
        self._obtain = obtain
        self._injections: dict[str, Injection] = {}
        self._vae: TransparentVAE | None = None

    def run(self, request: Request | None, job: Job) -> list[list[Made]]:
        """For each of the job's pictures, what belongs together. Raises LayerDiffuseError."""
        usual = self.host.usual_size
        job = replace(job, width=job.width or usual, height=job.height or usual)
        check(job, request)
        if request is None:
            return self._step(None, job)
        self._check_family(request)
        if not request.method.chain:
            return self._step(request, job)
        images: dict[Layer, Sequence[Image.Image]] = dict(request.images)
        runs: list[list[Made]] = []
        for step in request.method.chain:
            sampler = sampler_for(step.avoids, job.sampler)
            together = self._step(request.for_step(step, images), replace(job, sampler=sampler))
            runs.append([made for [made] in together])
            [layer] = find_method(step.key).outputs
            images[layer] = [made.image for made in runs[-1]]
        return [list(together) for together in zip(*runs)]

    def encode(self, image: Image.Image) -> Latent:
        """The latent of a picture with its transparency in it, in VAE space."""
        check_picture(image)
        rgba = from_pil(image.convert("RGBA"))[None]
        mean, deviation = self._posterior(compose(rgba, GREY))
        return mean + deviation * self.vae.encode(rgba).to(mean)

    def decode(self, latent: Latent, painted: Rgb | None = None, passes: int = MOST_PASSES) -> Rgba:
        """The picture in a latent (VAE space). painted: what the model's VAE shows of it, where that is known."""
        rgb = self.host.pixels(latent) if painted is None else painted
        return self.vae.decode(rgb, latent.to(rgb), passes)

    def _posterior(self, rgb: Rgb) -> tuple[Latent, Latent]:
        mean, deviation = self.host.posterior(rgb)
        check_encoded(mean)
        return mean, deviation

    @property
    def vae(self) -> TransparentVAE:
        if self._vae is None:
            family, device = self.host.family, self.host.unet.device
            decoder = TransparentDecoder.from_state_dict(read_tensors(self._obtain(DECODERS[family])))
            encoder = TransparentEncoder.from_state_dict(read_tensors(self._obtain(ENCODERS[family])))
            self._vae = TransparentVAE(*(net.to(device, torch.float32) for net in (decoder, encoder)))
        return self._vae

    def _check_family(self, request: Request) -> None:
        method = request.method
        if method.family is not self.host.family:
            raise LayerDiffuseError(
                f"{method.full_title} needs {method.family.word}, but the model is {self.host.family.word}. "
                "Choose another model, or a method for this one."
            )

    def _step(self, request: Request | None, job: Job) -> list[list[Made]]:
        outputs: Sequence[Layer | None] = request.method.outputs if request else (None,)
        layers = list(outputs) * job.count
        texts = [request.words_before(layer) if request and layer else "" for layer in outputs]
        prompts = [", ".join(filter(None, [text, job.prompt])) for text in texts] * job.count
        seeds = range(job.seed, job.seed + len(prompts))
        sampling = Sampling(
            prompts, seeds, job.negative, job.width, job.height, job.steps, job.cfg, job.sampler, job.strength
        )
        start = self._start(job, layers) if job.inits else None
        with self._injected(request, job):
            latents = self.host.vae_latent(self.host.sample(sampling, start))
        passes = (request.passes if request else 0) or MOST_PASSES
        made = [self._made(*row, passes) for row in zip(latents.split(1), layers, seeds)]
        return [made[i : i + len(outputs)] for i in range(0, len(made), len(outputs))]

    def _made(self, latent: Latent, layer: Layer | None, seed: int, passes: int) -> Made:
        painted = self.host.pixels(latent)
        check_painted(painted, latent)
        opaque = to_pil(painted[0])
        image = to_pil(self.decode(latent, painted, passes)[0]) if layer is Layer.FG else opaque
        return Made(image, opaque, layer, latent, seed)

    def _start(self, job: Job, layers: Sequence[Layer | None]) -> Latent:
        """What the rows of img2img start from, sampler space: transparency goes into those of foregrounds only."""
        fitted = [fit(image, ResizeMode.CROP_AND_RESIZE, job.width, job.height) for image in job.inits]
        frames = len(layers) // job.count
        rows = [(fitted[row // frames % len(fitted)], layer) for row, layer in enumerate(layers)]
        latents = [
            self.encode(image) if layer is Layer.FG else self._posterior(over_grey(image))[0] for image, layer in rows
        ]
        return self.host.sampler_latent(torch.cat(latents))

    def _injected(self, request: Request | None, job: Job) -> AbstractContextManager[None]:
        if request is None or not request.injects:
            return nullcontext()
        injection = self._injection(request)
        condition = self._condition(request, injection, job)
        return self.host.inject(injection, request.weight, request.starting_step, request.ending_step, condition)

    def _injection(self, request: Request) -> Injection:
        """Only the last one is kept, as each may have gigabytes."""
        file = request.method.weights
        if file not in self._injections:
            self._injections = {file: load_injection(request.method, self._obtain(file))}
        return self._injections[file]

    def _condition(self, request: Request, injection: Injection, job: Job) -> Tensor | None:
        """What the injection reads of the images given, one for all pictures or one for each."""
        given = [request.images[layer] for layer in request.method.inputs]
        if not given:
            return None

        def pixels(images: Sequence[Image.Image]) -> Rgb:
            fitted = [fit(image, request.resize_mode, job.width, job.height) for image in images]
            return torch.cat([over_grey(image) for image in fitted]).to(self.host.unet.device)

        rgb = [pixels(images) for images in given]
        if not isinstance(injection.content, WeightPatch):
            [picture] = rgb
            return picture
        several = max(map(len, rgb))
        latents = [self._posterior(picture)[0].expand(several, -1, -1, -1) for picture in rgb]
        return self.host.sampler_latent(torch.cat(latents, dim=1))


def check(job: Job, request: Request | None = None) -> None:
    """Raises LayerDiffuseError where a job cannot be sampled, as far as can be said without the model."""
    for problem in problems(job, request):
        raise LayerDiffuseError(problem)


def problems(job: Job, request: Request | None) -> Iterator[str]:
    rows = job.count * (request.method.frames if request else 1)
    for name, side in (("width", job.width), ("height", job.height)):
        if side and (side < SMALLEST or side % LATENT_STRIDE):
            yield f"The {name} is {side}. Choose one from {SMALLEST} that {LATENT_STRIDE} divides."
    if job.count < 1 or job.steps < 1:
        yield f"{job.count} pictures of {job.steps} steps were asked for. Choose at least one of each."
    if job.steps > MOST_STEPS:
        yield f"{job.steps} steps were asked for. Choose at most {MOST_STEPS}."
    if (pixels := rows * (job.width or SMALLEST) * (job.height or SMALLEST)) > MAX_PIXELS:
        yield f"All pictures have {pixels:,} pixels, and {MAX_PIXELS:,} is the limit. Choose a smaller size or count."
    if not 0 <= job.seed <= SEEDS - rows:
        yield f"The seed is {job.seed}. Choose one from 0 to {SEEDS - rows}."
    if not isfinite(job.cfg):
        yield f"The CFG scale is {job.cfg}. Choose a number such as 7."
    if job.sampler not in SAMPLERS:
        yield f"There is no sampler {job.sampler}. Choose one of {', '.join(SAMPLERS)}."
    if not 0 < job.strength <= 1:
        yield f"The strength is {job.strength:g}. Choose one above 0, up to 1."
    if job.inits and job.steps * job.strength < 1:
        yield (
            f"A strength of {job.strength:g} leaves none of {job.steps} steps. Choose a strength of at least "
            f"{1 / job.steps:.2g}, or at least {ceil(1 / job.strength)} steps."
        )
    if job.inits and request and request.method.chain:
        yield f"{request.method.full_title} runs several methods, which cannot start from a picture."
    for words in (job.prompt, job.negative):
        if any("\ud800" <= letter <= "\udfff" for letter in words):
            yield f"The prompt {shortened(words)} is not text in UTF-8. Write it anew."


def check_picture(image: Image.Image) -> None:
    """Raises LayerDiffuseError where the picture has no latent."""
    if image.width % LATENT_STRIDE or image.height % LATENT_STRIDE:
        raise LayerDiffuseError(
            f"The picture has {image.width}x{image.height} pixels. Choose a width and height that {LATENT_STRIDE} "
            "divides."
        )
