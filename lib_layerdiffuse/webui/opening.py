"""From a request to the Session of a job: everything that can fail before sampling is checked and prepared."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from lib_layerdiffuse.engine.engine import Engine, check_family
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.rgba import fit, flattened
from lib_layerdiffuse.methods import Method, needed_files
from lib_layerdiffuse.request.advice import notes
from lib_layerdiffuse.request.layers import Request
from lib_layerdiffuse.webui.host import Host, check_mask, init_picture, whole_cells
from lib_layerdiffuse.webui.job import Job
from lib_layerdiffuse.webui.session import Session

SWITCH_OFF = "switch LayerDiffuse off"


def open_session(host: Host, engine: Engine, p: Job, request: Request) -> Session:
    """Raises LayerDiffuseError."""
    check_method(host, p, request.method)
    inits = flatten_inits(host, p)
    host.flatten_mask(p)
    host.flatten_upscaled(p, flattened)
    if request.chain is None:
        announce(host, engine, p, request)
    if request.method.chain:
        request = request.for_step(request.method.chain[0], request.images)
    method = request.method
    if method.frames > 1:
        host.fit_batch(p, method.frames)
    decodes = method.decodes and not host.script_run(p).is_opaque
    vae = engine.weights.vae(method.family, bool(inits)) if decodes else None
    return Session(host, engine, request, engine.injection(request), vae, inits)


def flatten_inits(host: Host, p: Job) -> list[Image.Image]:
    """The pictures that img2img starts from, as RGBA; the host gets what is opaque of them."""
    inits = [init_picture(image) for image in distinct(host.init_images(p))]
    if not inits:
        return []
    mode = host.init_mode(p)
    if mode is None:  # enlarged as latents
        inits = [whole_cells(image) for image in inits]
    elif not host.only_masked(p):
        inits = [fit(image, mode, *host.size(p)) for image in inits]
    host.set_init_images(p, [flattened(image) for image in inits])
    return inits


def check_method(host: Host, p: Job, method: Method) -> None:
    """Raises LayerDiffuseError where the method does not go with the job."""
    check_family(method, host.backend.base_model())
    if method.frames > 1 and host.upscales(p):
        raise LayerDiffuseError(
            f"{method.full_title} makes {method.frames} pictures that belong together, but the upscale button has only "
            f"one. Tick Hires. fix and generate all of them, or {SWITCH_OFF}."
        )
    check_mask(host, p)
    count = len(distinct(host.init_images(p)))
    if method.frames > 1 and count > 1:
        raise LayerDiffuseError(
            f"{method.full_title} makes {method.frames} pictures from one init image, but {count} came. "
            "Send one at a time."
        )
    if method.chain and count:
        raise LayerDiffuseError(
            f"{method.full_title} starts from nothing. Use it in txt2img, or choose a method of one step here."
        )


def announce(host: Host, engine: Engine, p: Job, request: Request) -> None:
    """Before a job, and before the first of a chain: have all the files, and say what is to be known."""
    for file in needed_files(request.method, request.injects, bool(host.init_images(p))):
        engine.weights.obtain(file)
    for note in notes(request, *host.size(p), host.sampler(p)):
        host.note(p, note)
    if refiner := host.refiner(p):
        host.note(p, f"LayerDiffuse ends where the refiner takes over: {refiner}.")
    host.expect(p, len(request.method.steps))


def distinct(images: Sequence[Image.Image]) -> Sequence[Image.Image]:
    """The images, or the one of them where all are the same: a folder's images come repeated to the batch."""
    return images[:1] if len({id(image) for image in images}) == 1 else images
