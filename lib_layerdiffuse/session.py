"""One job from its request to its pictures. A Session lives on the host's job object, never on the script."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from PIL import Image

from lib_layerdiffuse import outputs
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.hosts.base import BaseModel, Host
from lib_layerdiffuse.images import over_grey
from lib_layerdiffuse.injection import Injection, load_injection
from lib_layerdiffuse.methods import DECODERS, Family, Method
from lib_layerdiffuse.nets.decoder import TransparentDecoder
from lib_layerdiffuse.outputs import EXTRAS, Picture, make_picture
from lib_layerdiffuse.request import Request
from lib_layerdiffuse.tensors import Latent, Rgb, Rgba
from lib_layerdiffuse.vae import TransparentVAE, is_out_of_memory
from lib_layerdiffuse.weights import WeightLibrary, fingerprint, read_tensors

log = logging.getLogger("layerdiffuse")

# What the decoder keeps alive at its peak: about this many channels of the picture's size (a generous estimate, by
# which the host makes room beforehand).
DECODE_CHANNELS = 600

SWITCH_OFF = "switch LayerDiffuse off"


class Workshop:
    """What outlives a job: the weights that the last job used, and a decoder for each family."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self._injections: dict[str, Injection] = {}
        self._vaes: dict[str, TransparentVAE] = {}

    def open(self, p: Any, request: Request) -> Session:
        """Check and prepare everything that can fail before sampling. Raises LayerDiffuseError."""
        method = request.method
        check_family(method, self.host.base_model(p))
        if self.host.has_mask(p):
            raise LayerDiffuseError(f"LayerDiffuse does not do inpainting yet. Remove the mask, or {SWITCH_OFF}.")
        if init_images := self.host.init_images(p):
            self.host.set_init_images(p, [opaque(image) for image in init_images])
        self.host.flatten_upscaled(p, over_grey)
        injection = self._injection(method) if request.injects else None
        return Session(self.host, request, injection, self._vae(method.family))

    def _injection(self, method: Method) -> Injection:
        """Only the last one is kept: each is up to 3.6 GB."""
        path = self._path(method.weights)
        identity = fingerprint(path)
        if identity not in self._injections:
            self._injections.clear()
            self._injections[identity] = load_injection(method, path)
        return self._injections[identity]

    def _vae(self, family: Family) -> TransparentVAE:
        path = self._path(DECODERS[family])
        identity = fingerprint(path)
        if identity not in self._vaes:
            self._vaes[identity] = TransparentVAE(load_decoder(path))
        return self._vaes[identity]

    def _path(self, file: str) -> Path:
        library = WeightLibrary(self.host.weight_folders())
        with self.host.progress() as show:

            def report(text: str, fraction: float) -> None:
                if self.host.interrupted():
                    raise LayerDiffuseError(f"{text}, interrupted. The next job goes on from there.")
                show(text, fraction)

            return library.obtain(file, report)


def check_family(method: Method, model: BaseModel) -> None:
    if model.family is not method.family:
        raise LayerDiffuseError(
            f"{method.label} needs a plain {method.family.word} checkpoint, but {model.checkpoint} is {model.kind}. "
            "Choose another checkpoint, or a method for this one."
        )


def opaque(init_image: Image.Image) -> Image.Image:
    """What img2img can start from; for a picture of ours, which Loopback feeds back, the opaque one beside it."""
    if own := outputs.picture_of(init_image):
        return own.opaque
    if outputs.has_alpha(init_image):
        raise LayerDiffuseError(
            "LayerDiffuse does not do img2img from a picture with transparency yet. Use an opaque picture, or "
            f"{SWITCH_OFF}."
        )
    return init_image


def load_decoder(path: Path) -> TransparentDecoder:
    """Raises LayerDiffuseError, naming the file, where it is not whole or not a transparent decoder."""
    try:
        return TransparentDecoder.from_state_dict(read_tensors(path))
    except LayerDiffuseError as error:
        raise LayerDiffuseError(f"{path}: {error}") from error


class Session:
    """One run of the host's processing: what was asked, what goes into the UNet, and the pictures that came out."""

    def __init__(self, host: Host, request: Request, injection: Injection | None, vae: TransparentVAE) -> None:
        self.host = host
        self.request = request
        self.injection = injection
        self.vae = vae
        self.passes = int(host.option("layerdiffuse_passes"))
        self.pictures: list[Picture] = []
        self._latent: Latent | None = None  # of the latest sampling, sampler space
        self._decoded: list[tuple[Rgba, Rgb]] = []  # of the current batch, with the pixels they were decoded from
        log.info("%s, weight %g, stop at %g", request.method.label, request.weight, request.ending_step)

    @property
    def infotext(self) -> dict[str, Any]:
        return {
            outputs.METHOD_KEY: self.request.method.label,
            "LayerDiffuse weight": self.request.weight,
            "LayerDiffuse stop at": self.request.ending_step,
            "LayerDiffuse passes": self.passes,
        }

    def before_sampling(self, p: Any) -> None:
        """For each sampling pass of the job, the last of which makes the latent that is decoded."""

        def injected() -> AbstractContextManager[None]:
            check_family(self.request.method, self.host.base_model(p))  # the hires pass may have its own checkpoint
            if self.injection is None:
                return nullcontext()
            return self.host.inject(p, self.injection, self.request.weight, self.request.ending_step)

        def finished(latent: Latent) -> None:
            self._latent = latent

        self.host.around_sampling(p, injected, finished)

    def decode_batch(self, p: Any, pixels: Sequence[Rgb]) -> None:
        """Decode the batch just sampled. pixels: what the host made of each picture, [3, H, W]."""
        assert self._latent is not None, "the host decoded a batch without sampling it"
        start = time.perf_counter()
        latents = self.host.vae_latent(p, self._latent)
        self._decoded = [
            (self._decode(painted[None], latent[None])[0], painted)
            for painted, latent in zip(pixels, latents, strict=True)
        ]
        log.info("decoded %d pictures in %.1f s", len(pixels), time.perf_counter() - start)

    def _decode(self, rgb: Rgb, latent: Latent) -> Rgba:
        memory = DECODE_CHANNELS * rgb[0, 0].numel() * next(self.vae.decoder.parameters()).element_size()
        with self.host.progress() as report:

            def on_pass(done: int, total: int) -> bool:
                report(f"LayerDiffuse: decoding, pass {done} of {total}", done / total)
                return not self.host.interrupted()

            for device in self.host.places(self.vae.decoder, memory):
                try:
                    self.vae.decoder.to(device)  # all of it: short of memory, hosts leave layers behind
                    return self.vae.decode(rgb, latent, self.passes, on_pass)
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
        height, width = rgb.shape[-2:]
        raise LayerDiffuseError(f"Not enough memory to decode a picture of {width}x{height}. Choose a smaller size.")

    def finish_picture(self, index: int, shown: Image.Image) -> Image.Image:
        """The RGBA for the picture at `index` of the batch. shown: the host's picture, perhaps edited by others."""
        decoded, painted = self._decoded[index]
        rgba = outputs.transparent(decoded, painted, shown)
        picture = make_picture(rgba, shown, self.host.option("layerdiffuse_extras"))
        self.pictures.append(picture)
        return outputs.mark(rgba, picture)

    def finish(self, p: Any, processed: Any) -> None:
        """Show the extras behind the pictures, by kind."""
        extras = [picture.extras[name] for name in EXTRAS for picture in self.pictures if name in picture.extras]
        self.host.show(p, processed, extras)
        for image in (*processed.images, *processed.extra_images):
            if isinstance(image, Image.Image) and not outputs.is_marked(image):
                outputs.mark(image)
