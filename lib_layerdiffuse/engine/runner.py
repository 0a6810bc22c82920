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
class Task:
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

    def run(self, request: Request | None, task: Task) -> list[list[Made]]:
        """For each of the task's pictures, what belongs together. Raises LayerDiffuseError."""
        usual = self.backend.usual_size
        task = replace(task, width=task.width or usual, height=task.height or usual)
        check_task(task, request, self.backend.samplers)
        if request is None:
            return self._step(None, task)
        check_family(request.method, self.backend.base_model())
        if not request.method.chain:
            return self._step(request, task)
        runs: list[list[Made]] = []

        def run(asked: Request, step: Step) -> list[Image.Image]:
            sampler = sampler_for(step.avoids, task.sampler)
            runs.append([made for [made] in self._step(asked, replace(task, sampler=sampler))])
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

    def _step(self, request: Request | None, task: Task) -> list[list[Made]]:
        outputs: Sequence[Layer | None] = request.method.outputs if request else (None,)
        layers = list(outputs) * task.count
        words = words_before(request) if request else [""]
        prompts = [", ".join(filter(None, [text, task.prompt])) for text in words] * task.count
        seeds = range(task.seed, task.seed + len(prompts))
        sampling = Sampling(
            prompts, seeds, task.negative, task.width, task.height, task.steps, task.cfg, task.sampler, task.strength
        )
        start = self._start(task, layers, len(outputs)) if task.inits else None
        with self._injected(request, task):
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

    def _start(self, task: Task, layers: Sequence[Layer | None], frames: int) -> Latent:
        """What the rows of img2img start from, in sampler space."""
        fitted = [fit(image, ResizeMode.CROP_AND_RESIZE, task.width, task.height) for image in task.inits]
        encode = self._encoded if Layer.FG in layers else lambda image: self.engine.posterior(over_grey(image))[:1]
        encoded = [encode(image) for image in fitted]
        return self.engine.start(encoded, layers, frames)

    def _injected(self, request: Request | None, task: Task) -> AbstractContextManager[None]:
        if request is None:
            return nullcontext()
        injection = self.engine.injection(request)
        return self.engine.inject(request, injection, lambda: self._condition(request, injection, task))

    def _condition(self, request: Request, injection: Injection | None, task: Task) -> Tensor | None:
        """What the injection reads of the images given, one for all pictures or one for each."""
        given = [request.images[layer] for layer in request.method.inputs]
        if not given or injection is None:
            return None

        def pixels(images: Sequence[Image.Image]) -> Rgb:
            return torch.cat([over_grey(fit(image, request.resize_mode, task.width, task.height)) for image in images])

        return self.engine.condition(injection, [pixels(images) for images in given])


def check_task(task: Task, request: Request | None, samplers: Collection[str]) -> None:
    """Raises LayerDiffuseError where a task cannot be sampled, as far as can be said without the model."""
    for problem in problems(task, request, samplers):
        raise LayerDiffuseError(problem)


def problems(task: Task, request: Request | None, samplers: Collection[str]) -> Iterator[str]:
    rows = task.count * (request.method.frames if request else 1)
    for name, side in (("width", task.width), ("height", task.height)):
        if side and (side < SMALLEST or side % LATENT_STRIDE):
            yield f"The {name} is {side}. Choose one from {SMALLEST} that {LATENT_STRIDE} divides."
    if task.count < 1 or task.steps < 1:
        yield f"{task.count} pictures of {task.steps} steps were asked for. Choose at least one of each."
    if task.steps > MOST_STEPS:
        yield f"{task.steps} steps were asked for. Choose at most {MOST_STEPS}."
    if (pixels := rows * (task.width or SMALLEST) * (task.height or SMALLEST)) > MAX_PIXELS:
        yield f"All pictures have {pixels:,} pixels, and {MAX_PIXELS:,} is the limit. Choose a smaller size or count."
    if not 0 <= task.seed <= SEEDS - rows:
        yield f"The seed is {task.seed}. Choose one from 0 to {SEEDS - rows}."
    if not isfinite(task.cfg):
        yield f"The CFG scale is {task.cfg}. Choose a number such as 7."
    if task.sampler not in samplers:
        yield f"There is no sampler {task.sampler}. Choose one of {', '.join(samplers)}."
    if not 0 < task.strength <= 1:
        yield f"The strength is {task.strength:g}. Choose one above 0, up to 1."
    if task.inits and task.steps * task.strength < 1:
        yield (
            f"A strength of {task.strength:g} leaves none of {task.steps} steps. Choose a strength of at least "
            f"{1 / task.steps:.2g}, or at least {ceil(1 / task.strength)} steps."
        )
    if task.inits and request and request.method.chain:
        yield f"{request.method.full_title} runs several methods, which cannot start from a picture."
    for words in (task.prompt, task.negative):
        if any("\ud800" <= letter <= "\udfff" for letter in words):
            yield f"The prompt {shortened(words)} is not text in UTF-8. Write it anew."


def check_picture(image: Image.Image) -> None:
    """Raises LayerDiffuseError where the picture has no latent."""
    if image.width % LATENT_STRIDE or image.height % LATENT_STRIDE:
        raise LayerDiffuseError(
            f"The picture has {image.width}x{image.height} pixels. Choose a width and height that {LATENT_STRIDE} "
            "divides."
        )
