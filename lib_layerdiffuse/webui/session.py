"""One job from its request to its pictures. A Session lives on the host's job object, never on the script."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor

from lib_layerdiffuse.engine.engine import Engine, run_chain, words_before
from lib_layerdiffuse.engine.memory import return_freed_memory
from lib_layerdiffuse.images.extras import EXTRAS, OPAQUE, RGBA, make_extras
from lib_layerdiffuse.images.rgba import (
    ResizeMode,
    blended,
    content_hash,
    fill_masked,
    fit,
    from_pil,
    over_grey,
    to_pil,
)
from lib_layerdiffuse.injection.content import Injection
from lib_layerdiffuse.methods import Layer, Step
from lib_layerdiffuse.request.advice import alpha_note, sampler_for
from lib_layerdiffuse.request.layers import FORM, Request
from lib_layerdiffuse.tensors import Latent, Rgb, Rgba
from lib_layerdiffuse.vae import LATENT_STRIDE, TransparentVAE
from lib_layerdiffuse.webui import outputs
from lib_layerdiffuse.webui.host import Host, seen, whole_cells
from lib_layerdiffuse.webui.job import Job, Processed
from lib_layerdiffuse.webui.outputs import LAYER_KEY, Picture, host_pixels

log = logging.getLogger("layerdiffuse")


class Session:
    """One run of the host's processing: what was asked, what goes into the UNet, and the pictures that came out."""

    def __init__(
        self,
        host: Host,
        engine: Engine,
        request: Request,
        injection: Injection | None,
        vae: TransparentVAE | None,
        inits: Sequence[Image.Image] = (),
    ) -> None:
        self.host = host
        self.engine = engine
        self.request = request
        self.method = request.method
        self.injection = injection
        self.vae = vae  # where a picture of the method is decoded
        self.inits = inits  # RGBA, one for all pictures of a batch or one for each
        self.passes = request.passes or int(host.option("layerdiffuse_passes"))
        self.pictures: list[Picture] = []
        self.images: list[Image.Image] = []  # the same, as they are shown
        self._latent: Latent | None = None  # of the latest sampling, sampler space
        self._decoded: list[tuple[Rgba, Rgb] | None] = []  # of the current batch, with the pixels they come from
        self._conditions: dict[tuple[int, int, range], Tensor] = {}
        self._mask: Image.Image | None = None  # as it is sampled
        self._overlays: dict[int, Image.Image | None] = {}  # by the index in the batch
        self._encoded: list[tuple[Latent, Latent]] = []  # of each of `inits`; see `_encode`
        log.info(
            "%s, weight %g, from %g to %g",
            self.method.full_title,
            request.weight,
            request.starting_step,
            request.ending_step,
        )

    @property
    def infotext(self) -> dict[str, Any]:
        request = self.request
        values = {"method": self.method.label, "weight": request.weight, "ending_step": request.ending_step}
        if request.starting_step:
            values["starting_step"] = request.starting_step
        if self.method.inputs:
            values["resize_mode"] = request.resize_mode.value
        for layer, prompt in request.prompts.items():
            if layer in self.method.outputs:
                values[f"{layer.value}_prompt"] = prompt
        if self.vae:
            values["passes"] = self.passes
        if request.grey_background and self.method.makes_foreground:
            values["grey_background"] = True
        text: dict[str, Any] = {FORM.infotext(name): value for name, value in values.items()}
        for layer in self.method.inputs:
            text[f"LayerDiffuse {layer.word} image"] = " ".join(map(content_hash, request.images[layer]))
        if self.method.frames > 1:
            text |= self._of_frames()
        return text

    def _of_frames(self) -> dict[str, Callable[..., Any]]:
        """What differs between the pictures that belong together, and what must not, or none of them could be repeated.

        The host calls these for each picture of a batch.
        """

        def first(index: int) -> int:
            return index - index % self.method.frames

        return {
            LAYER_KEY: lambda index, **more: self._layer(index).word,
            "Seed": lambda index, all_seeds, **more: all_seeds[first(index)],
            "Variation seed": lambda p, index, all_subseeds, **more: (
                all_subseeds[first(index)] if p.subseed_strength else None
            ),
        }

    def _layer(self, row: int) -> Layer:
        return self.method.outputs[row % self.method.frames]

    def _is_decoded(self, row: int) -> bool:
        return self.vae is not None and self._layer(row) is Layer.FG

    def before_prompts(self, p: Job) -> None:
        """For each batch, before the host reads its prompts."""
        texts = words_before(self.request)
        if any(texts):
            self.host.put_before_prompts(p, texts)

    def before_inits(self, mask: Image.Image | None) -> None:
        """When the host has worked out how it will sample. mask: the part of it that is sampled, at that size."""
        self._mask = mask

    def before_sampling(self, p: Job) -> None:
        """For each sampling pass of the job, the last of which makes the latent that is decoded."""
        if self.inits and self.vae:
            self.host.start_from(p, self._start_latents(p))

        def injected(x: Latent, noise: Latent) -> AbstractContextManager[None]:
            height, width = (LATENT_STRIDE * side for side in x.shape[2:])
            return self.engine.inject(self.request, self.injection, lambda: self._condition(p, width, height))

        self.host.around_sampling(p, "layerdiffuse", injected, self.sampled)

    def sampled(self, latent: Latent) -> None:
        """What came out of the latest sampling, in sampler space; again, if it is changed since."""
        self._latent = latent

    def _start_latents(self, p: Job) -> Latent:
        """What a batch of img2img starts from."""
        if not self._encoded:
            self._encoded = [self._encode(p, init) for init in self.inits]
        layers = [self._layer(row) for row in range(len(self.host.rows(p)))]
        return self.engine.start(self._encoded, layers, self.method.frames)

    def _encode(self, p: Job, init: Image.Image) -> tuple[Latent, Latent]:
        """The latents of the picture over grey, and of the picture with its transparency, in VAE space."""
        assert self.vae is not None, "a start without an encoder"
        rgba = from_pil(seen(self.host, p, init))[None]
        if self.host.fills_mask(p) and (mask := self._mask or self.host.latent_mask(p)):
            rgba = fill_masked(rgba, from_pil(whole_cells(mask))[None, :1])
        return self.engine.encode(self.vae, rgba)

    def _condition(self, p: Job, width: int, height: int) -> Tensor | None:
        """What the injection reads of the images given, for this batch; None where it reads none."""
        given = [self.request.images[layer] for layer in self.method.inputs]
        if not given or self.injection is None:
            return None
        rows = self.host.rows(p) if max(map(len, given)) > 1 else range(1)
        if (width, height, rows) not in self._conditions:
            rgb = [torch.cat([self._pixels(images, row, width, height) for row in rows]) for images in given]
            self._conditions[width, height, rows] = self.engine.condition(self.injection, rgb)
        return self._conditions[width, height, rows]

    def _pixels(self, images: Sequence[Image.Image], row: int, width: int, height: int) -> Rgb:
        return over_grey(self._fitted(images, row, width, height))

    def _fitted(self, images: Sequence[Image.Image], row: int, width: int, height: int) -> Image.Image:
        image = images[row if len(images) > 1 else 0]
        return fit(image, self.request.resize_mode, width, height)

    def decode_batch(self, p: Job, pixels: Sequence[Rgb]) -> None:
        """Decode the foregrounds of the batch just sampled. pixels: what the host made of each picture, [3, H, W]."""
        assert self._latent is not None, "the host decoded a batch without sampling it"
        start = time.perf_counter()
        if self.host.interrupted() and pixels[0].shape[1:] == self._latent.shape[2:]:
            self._decoded = [None] * len(pixels)  # ersatz shows an interrupted job's latents as they are
            return
        latents = self.engine.backend.vae_latent(self._latent)
        self._decoded = [
            (self._decode(painted[None], latent[None])[0], painted) if self._is_decoded(row) else None
            for row, (painted, latent) in enumerate(zip(pixels, latents, strict=True))
        ]
        if count := sum(decoded is not None for decoded in self._decoded):
            log.info("decoded %d pictures in %.1f s", count, time.perf_counter() - start)

    def _decode(self, rgb: Rgb, latent: Latent) -> Rgba:
        vae = self.vae
        assert vae is not None, "a foreground without a decoder"
        with self.host.progress() as report:

            def on_pass(done: int, total: int) -> bool:
                report(f"LayerDiffuse: decoding, pass {done} of {total}", done / total)
                return not self.host.interrupted()

            return self.engine.decode(vae, rgb, latent, self.passes, on_pass)

    def before_overlay(self, index: int, overlay: Image.Image | None) -> None:
        """What the host is about to put over the picture at `index` of the batch: the original that is not masked."""
        self._overlays[index] = overlay

    def finish_picture(self, p: Job, index: int, shown: Image.Image) -> Image.Image:
        """What the picture at `index` of the batch becomes: an RGBA, where it is a foreground.

        shown: the host's picture, perhaps edited by others.
        """
        image, sources = shown, {}
        self.host.script_run(p).foregrounds += self._layer(index) is Layer.FG
        if decoded := self._decoded[index]:
            image = self._transparent(p, index, *decoded, shown)
            if note := alpha_note(image):
                self.host.note(p, note)
            sources = {RGBA: image, OPAQUE: shown}
        self.images.append(image)
        if len(self.images) % self.method.frames == 0:
            sources |= self._together(*image.size)
        layer = self._layer(index)
        name = layer.value if self.request.several else ""
        picture = Picture(shown, make_extras(sources, self.host.option("layerdiffuse_extras")), name)
        self.pictures.append(picture)
        return outputs.mark(image, picture, caption=layer.word if self.request.several else "")

    def _transparent(self, p: Job, index: int, decoded: Rgba, painted: Rgb, shown: Image.Image) -> Image.Image:
        """The decoded picture with the edits of others, and with the original where that was not masked."""
        overlay = self._overlays.get(index)
        expected = self.host.overlaid(p, Image.fromarray(host_pixels(painted)), overlay)
        picture = to_pil(decoded)
        region = self.host.region(p)
        if overlay and region:
            picture = outputs.placed(picture, region, *overlay.size)
        image = outputs.transparent(picture, expected, shown)
        if overlay is None or image.size != overlay.size:
            return image
        original = fit(self.inits[index % len(self.inits)], ResizeMode.JUST_RESIZE, *image.size)
        return blended(original, image, ImageOps.invert(overlay.getchannel("A")))

    def _together(self, width: int, height: int) -> dict[str, Image.Image]:
        """The images that belong to the picture just finished, given and made."""
        row = len(self.images) // self.method.frames - 1
        given = {layer: self._fitted(self.request.images[layer], row, width, height) for layer in self.method.inputs}
        made = dict(zip(self.method.outputs, self.images[-self.method.frames :], strict=True))
        return {layer.value: image for layer, image in (given | made).items()}

    def finish(self, p: Job, processed: Processed) -> None:
        """Show the extras behind the pictures, by kind; run the rest of a chain; leave no memory behind."""
        texts = self.host.infotexts(processed)
        extras = [
            self._extra(name, picture.extras[name], text)
            for name in EXTRAS
            for picture, text in zip(self.pictures, texts)
            if name in picture.extras
        ]
        self.host.show(p, processed, extras, self.method.frames)
        for image in (*processed.images, *processed.extra_images):
            if isinstance(image, Image.Image) and not outputs.is_marked(image):
                outputs.mark(image)
        chain = self.request.chain
        if chain and self.method.key == chain.method.chain[0].key:
            self._go_on(p, processed, chain)
        return_freed_memory()

    def _extra(self, name: str, image: Image.Image, infotext: str) -> Image.Image:
        """Ready to be shown. infotext: of the picture that it belongs to."""
        text = outputs.text_of_extra(infotext, name)
        if self.host.option("enable_pnginfo"):
            image.info["parameters"] = text
        return outputs.mark(image, caption=EXTRAS[name].caption, infotext=text)

    def _go_on(self, p: Job, processed: Processed, asked: Request) -> None:
        """Run the further steps of a chain: this job was the first."""
        runs: list[Any] = []

        def run(request: Request, step: Step) -> Sequence[Image.Image] | None:
            if step is asked.method.chain[0]:
                return self.images
            if self.host.stopping():
                return None
            runs.append(self.host.run_again(p, request, sampler_for(step.avoids, self.host.sampler(p))))
            return runs[-1].images

        run_chain(asked, run)
        self.host.add_runs(p, processed, runs)
