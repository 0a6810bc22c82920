"""Jobs without a web UI: a request, prompts and seeds go in, pictures come out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from math import ceil, isfinite
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from lib_layerdiffuse.engine.backend import Backend
from lib_layerdiffuse.engine.engine import Engine, check_family, run_chain, words_before
from lib_layerdiffuse.engine.loaded import LoadedWeights
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.reading import MAX_PIXELS
from lib_layerdiffuse.images.rgba import ResizeMode, fit, from_pil, over_grey, to_pil
from lib_layerdiffuse.injection.content import Injection
from lib_layerdiffuse.methods import Layer, Step, shortened
from lib_layerdiffuse.request.advice import sampler_for
from lib_layerdiffuse.request.layers import Request
from lib_layerdiffuse.tensors import Latent, Rgb, Rgba
from lib_layerdiffuse.vae import LATENT_STRIDE, PASSES, TransparentVAE, check_painted

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


@dataclass(frozen=True)
class Sampling:
    """What is sampled: a picture for each prompt, with its seed."""

    prompts: Sequence[str]
    seeds: Sequence[int]
    negative: str
    width: int  # in pixels
    height: int
    steps: int
    cfg: float
    sampler: str
    strength: float = 1.0  # of img2img: the part of the steps that is sampled


class SamplingBackend(Backend, Protocol):
    """A loaded model that samples when it is told to, where web UIs and graphs do so by themselves."""

    @property
    def samplers(self) -> Collection[str]:
        """Their names."""

    @property
    def usual_size(self) -> int:
        """The side of the pictures that the model was trained on, in pixels."""

    def pixels(self, vae_latent: Latent) -> Rgb:
        """What the VAE shows of a latent."""

    def sample(self, sampling: Sampling, start: Latent | None = None) -> Latent:
        """In sampler space, as `start` is: what img2img begins with, one for each prompt."""


class Runner:
    """A model with the weights that go with it; keeps what it has read."""

    def __init__(self, backend: SamplingBackend, obtain: Callable[[str], Path]) -> None:
        """obtain: the path of a weight file, by its name."""
        self.backend = backend
        self.engine = Engine(backend, LoadedWeights(obtain, backend.forget))

    def run(self, request: Request | None, job: Job) -> list[list[Made]]:
        """For each of the job's pictures, what belongs together. Raises LayerDiffuseError."""
        usual = self.backend.usual_size
        job = replace(job, width=job.width or usual, height=job.height or usual)
        check(job, request, self.backend.samplers)
        if request is None:
            return self._step(None, job)
        check_family(request.method, self.backend.base_model())
        if not request.method.chain:
            return self._step(request, job)
        runs: list[list[Made]] = []

        def run(asked: Request, step: Step) -> list[Image.Image]:
            sampler = sampler_for(step.avoids, job.sampler)
            runs.append([made for [made] in self._step(asked, replace(job, sampler=sampler))])
            return [made.image for made in runs[-1]]

        run_chain(request, run)
        return [list(together) for together in zip(*runs)]

    @property
    def vae(self) -> TransparentVAE:
        """Decoder and encoder for the model. Raises LayerDiffuseError where there are none for its family."""
        model = self.backend.base_model()
        if model.family is None:
            raise LayerDiffuseError(f"{model.checkpoint} is {model.kind}, which LayerDiffuse has no weights for.")
        return self.engine.weights.vae(model.family, encodes=True)

    def encode(self, image: Image.Image) -> Latent:
        """The latent of a picture with its transparency in it, in VAE space."""
        check_picture(image)
        return self._encoded(image)[1]

    def decode(self, latent: Latent, painted: Rgb | None = None, passes: int = MOST_PASSES) -> Rgba:
        """The picture in a latent (VAE space). painted: what the model's VAE shows of it, where that is known."""
        rgb = self.backend.pixels(latent) if painted is None else painted
        return self.engine.decode(self.vae, rgb, latent, passes)

    def _encoded(self, image: Image.Image) -> tuple[Latent, Latent]:
        return self.engine.encode(self.vae, from_pil(image.convert("RGBA"))[None])

    def _step(self, request: Request | None, job: Job) -> list[list[Made]]:
        outputs: Sequence[Layer | None] = request.method.outputs if request else (None,)
        layers = list(outputs) * job.count
        words = words_before(request) if request else [""]
        prompts = [", ".join(filter(None, [text, job.prompt])) for text in words] * job.count
        seeds = range(job.seed, job.seed + len(prompts))
        sampling = Sampling(
            prompts, seeds, job.negative, job.width, job.height, job.steps, job.cfg, job.sampler, job.strength
        )
        start = self._start(job, layers, len(outputs)) if job.inits else None
        with self._injected(request, job):
            latents = self.backend.vae_latent(self.backend.sample(sampling, start))
        passes = (request.passes if request else 0) or MOST_PASSES
        made = [self._made(*row, passes) for row in zip(latents.split(1), layers, seeds)]
        return [made[i : i + len(outputs)] for i in range(0, len(made), len(outputs))]

    def _made(self, latent: Latent, layer: Layer | None, seed: int, passes: int) -> Made:
        painted = self.backend.pixels(latent)
        check_painted(painted, latent)
        opaque = to_pil(painted[0])
        image = to_pil(self.decode(latent, painted, passes)[0]) if layer is Layer.FG else opaque
        return Made(image, opaque, layer, latent, seed)

    def _start(self, job: Job, layers: Sequence[Layer | None], frames: int) -> Latent:
        """What the rows of img2img start from, in sampler space."""
        fitted = [fit(image, ResizeMode.CROP_AND_RESIZE, job.width, job.height) for image in job.inits]
        encode = self._encoded if Layer.FG in layers else lambda image: self.engine.posterior(over_grey(image))[:1]
        encoded = [encode(image) for image in fitted]
        return self.engine.start(encoded, layers, frames)

    def _injected(self, request: Request | None, job: Job) -> AbstractContextManager[None]:
        if request is None:
            return nullcontext()
        injection = self.engine.injection(request)
        return self.engine.inject(request, injection, lambda: self._condition(request, injection, job))

    def _condition(self, request: Request, injection: Injection | None, job: Job) -> Tensor | None:
        """What the injection reads of the images given, one for all pictures or one for each."""
        given = [request.images[layer] for layer in request.method.inputs]
        if not given or injection is None:
            return None

        def pixels(images: Sequence[Image.Image]) -> Rgb:
            return torch.cat([over_grey(fit(image, request.resize_mode, job.width, job.height)) for image in images])

        return self.engine.condition(injection, [pixels(images) for images in given])


def check(job: Job, request: Request | None, samplers: Collection[str]) -> None:
    """Raises LayerDiffuseError where a job cannot be sampled, as far as can be said without the model."""
    for problem in problems(job, request, samplers):
        raise LayerDiffuseError(problem)


def problems(job: Job, request: Request | None, samplers: Collection[str]) -> Iterator[str]:
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
    if job.sampler not in samplers:
        yield f"There is no sampler {job.sampler}. Choose one of {', '.join(samplers)}."
    if not 0 < job.strength <= 1:
        yield f"The strength is {job.strength:g}. Choose one above 0, up to 1."
    if job.inits and job.steps * job.strength < 1:
        yield (
            f"A strength of {job.strength:g} leaves none of {job.steps} steps. Choose a strength of at least "
            f"{1 / job.steps:.2g}, or at least {ceil(1 / job.strength)} steps."
        )
    if job.inits and request and request.method.chain:
        yield f"{request.method.label} runs several methods, which cannot start from a picture."
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
