"""One job of Differential Diffusion, from its change map to its pictures; it lives on the host's job object."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial

from PIL import Image, ImageOps

from lib_layerdiffuse.images.extras import on_checkerboard
from lib_layerdiffuse.images.rgba import ResizeMode, fit
from lib_layerdiffuse.request.differential import (
    TITLE,
    Change,
    check_changes,
    labelled,
    map_tensor,
    overlay_mask,
    released,
    union,
)
from lib_layerdiffuse.tensors import Latent
from lib_layerdiffuse.webui.host import Host, check_mask, init_picture, seen
from lib_layerdiffuse.webui.job import Job, Processed
from lib_layerdiffuse.webui.outputs import is_marked


class ChangeSession:
    """One run of the host's img2img in which each pixel changes as much as a map says."""

    def __init__(self, host: Host, p: Job, change: Change) -> None:
        """Raises LayerDiffuseError where there is nothing to make a map of."""
        self.host = host
        self.change = change
        mask = host.mask(p)
        self.maps = [change.map(init_picture(image), mask) for image in host.init_images(p)]
        self.steps = host.steps(p)
        self.masks = [overlay_mask(each, self.steps) for each in self.maps]
        host.set_mask(p, union(self.masks))
        check_mask(host, p)
        if refiner := host.refiner(p):
            host.note(p, f"{TITLE} ends where the refiner takes over: {refiner}.")
        for note in dict.fromkeys(note for each in self.maps for note in change.notes(each, self.steps)):
            host.note(p, note)

    def before_sampling(self, p: Job) -> None:
        """For each batch."""

        def held(x: Latent, noise: Latent) -> AbstractContextManager[None]:
            change = map_tensor([seen(self.host, p, each).convert("L") for each in self.maps], *x.shape[2:])
            check_changes(change, self.steps)
            return self.host.hold(p, x, noise, partial(released, change))

        self.host.around_sampling(p, "differential", held, lambda latent: None)

    def overlay(self, p: Job, index: int, overlay: Image.Image | None) -> Image.Image | None:
        """What of the original is put over the picture at `index` of the batch; overlay: where no picture changes."""
        if overlay is None or len(self.masks) == 1:
            return overlay
        mode = self.host.init_mode(p) or ResizeMode.JUST_RESIZE
        image, mask = (fit(each, mode, *overlay.size) for each in (self.host.flat_init(p, index), self.masks[index]))
        original = image.convert("RGB")
        original.putalpha(ImageOps.invert(mask.convert("L")))
        return original

    def finish(self, p: Job, processed: Processed) -> None:
        """Show and save a strength fan once more, with the strengths under its columns."""
        self.host.restore_mask(p)
        if self.change.fans:
            texts = [f"{strength:.2f}" for strength in self.change.strengths(p.denoising_strength, self.steps)]
            for index, image in enumerate(self.host.pictures(processed)):
                opaque = on_checkerboard(image) if is_marked(image) and image.mode == "RGBA" else image.convert("RGB")
                self.host.save_extra(p, processed, index, labelled(opaque, texts), "strengths")
