"""The web UI's hooks, each handed over to the job's Session; nothing else."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from modules import script_callbacks, scripts

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.extras import EXTRAS
from lib_layerdiffuse.request import differential, layers
from lib_layerdiffuse.request.differential import Change
from lib_layerdiffuse.request.layers import Request
from lib_layerdiffuse.webui import detect, ending, outputs, panel, xyz_axes
from lib_layerdiffuse.webui.api import routes
from lib_layerdiffuse.webui.differential_session import ChangeSession
from lib_layerdiffuse.webui.extension import Extension
from lib_layerdiffuse.webui.job import Job, Processed
from lib_layerdiffuse.webui.opening import open_session
from lib_layerdiffuse.webui.session import Session

log = logging.getLogger("layerdiffuse")
log.setLevel(logging.INFO)
if not log.hasHandlers():  # Forge sets up none, unless it is started with --loglevel
    log.addHandler(logging.StreamHandler())
    log.handlers[0].setFormatter(logging.Formatter("[LayerDiffuse] %(message)s"))

try:
    host = detect.web_ui()
    extension = Extension(host)
    page = panel.Page(extension)
    unsupported = ""
except LayerDiffuseError as error:
    unsupported = str(error)


# In its infotext, this marks a picture as ours, also when it comes back from a file.
METHOD_KEY = layers.FORM.infotext("method")


@contextmanager
def ending_job(p: Job, processed: Processed | None = None) -> Iterator[None]:
    """Hooks' exceptions are swallowed by the web UI, which goes on to an ordinary picture: end the job instead."""
    try:
        yield
    except Exception as error:
        if unsupported:
            ending.end(p, error, processed)
        else:
            host.fail(p, error, processed)


def refuse(args: Sequence[object]) -> None:
    """In a web UI that we do not know. Raises LayerDiffuseError where an ordinary picture is not what was asked for."""
    if layers.FORM.is_on(args):
        raise LayerDiffuseError(f"{unsupported} Switch LayerDiffuse off for an ordinary picture.")


def session_of(p: Job) -> Session | None:
    return getattr(p, "layerdiffuse", None)


def change_of(p: Job) -> ChangeSession | None:
    return getattr(p, "differential", None)


def by_detailer(p: Job) -> bool:
    """ADetailer repaints parts of a picture in jobs of its own; what we do to them, we do to the whole afterwards."""
    return getattr(p, "_ad_inner", False)


class DifferentialDiffusion(scripts.Script):
    """Before LayerDiffuse in this file, and so at each hook: it takes maps from init images that still have alpha."""

    def title(self) -> str:
        return differential.TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible if is_img2img and not unsupported else False

    def ui(self, is_img2img: bool) -> list[Any]:
        components = panel.change_panel()
        self.infotext_fields = panel.paste_fields(differential.FORM, components)
        return components

    def process(self, p: Job, *args: Any) -> None:
        p.differential = None
        with ending_job(p):
            change = None if by_detailer(p) else Change.parse(args)
            if change:
                p.differential = ChangeSession(host, p, change)
                p.extra_generation_params.update(change.infotext)

    def process_before_every_sampling(self, p: Job, *args: Any, **kwargs: Any) -> None:
        if session := change_of(p):
            with ending_job(p):
                session.before_sampling(p)

    def postprocess_maskoverlay(self, p: Job, ppmo: Any, *args: Any) -> None:
        if session := change_of(p):
            with ending_job(p):
                overlay = outputs.one_overlay(ppmo.overlay_image)
                ppmo.overlay_image = session.overlay(p, p.batch_index, overlay)

    def postprocess(self, p: Job, processed: Processed, *args: Any) -> None:
        with ending_job(p, processed):
            ending.raise_late(p)
            if (session := change_of(p)) and processed.images:
                session.finish(p, processed)


class LayerDiffuse(scripts.Script):
    def title(self) -> str:
        return panel.TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        tab = "img2img" if is_img2img else "txt2img"
        if unsupported:
            return panel.notice(tab, unsupported)
        components = page.panel(tab)
        self.infotext_fields = panel.paste_fields(layers.FORM, components)
        return components

    def process(self, p: Job, *args: Any) -> None:
        p.layerdiffuse = p.layerdiffuse_error = (
            None  # scripts such as X/Y/Z plot run a copy of a `p` that has run before
        )
        if by_detailer(p):
            return
        with ending_job(p):
            if unsupported:
                refuse(args)
                return
            asked = getattr(p, "layerdiffuse_request", None) or Request.parse(args, getattr(p, "layerdiffuse_axes", {}))
            if asked:
                p.layerdiffuse = open_session(host, extension.engine, p, asked)
                p.extra_generation_params.update(p.layerdiffuse.infotext)

    def before_process_init_images(self, p: Job, pp: Any, *args: Any, **kwargs: Any) -> None:
        if session := session_of(p):
            session.before_inits(pp["image_mask"])

    def before_process_batch(self, p: Job, *args: Any, **kwargs: Any) -> None:
        if session := session_of(p):
            with ending_job(p):
                session.before_prompts(p)

    def process_batch(self, p: Job, *args: Any, **kwargs: Any) -> None:
        if session_of(p):
            host.restore_prompts(p)

    def process_before_every_sampling(self, p: Job, *args: Any, **kwargs: Any) -> None:
        if session := session_of(p):
            with ending_job(p):
                session.before_sampling(p)

    def post_sample(self, p: Job, ps: Any, *args: Any) -> None:
        if (session := session_of(p)) and torch.is_tensor(ps.samples):  # blended with the original by now
            session.sampled(ps.samples)

    def postprocess_batch_list(self, p: Job, pp: Any, *args: Any, **kwargs: Any) -> None:
        if session := session_of(p):
            with ending_job(p):
                session.decode_batch(p, pp.images)

    def postprocess_maskoverlay(self, p: Job, ppmo: Any, *args: Any) -> None:
        if session := session_of(p):
            ppmo.overlay_image = outputs.one_overlay(ppmo.overlay_image)
            session.before_overlay(p.batch_index, ppmo.overlay_image)

    def postprocess_image_after_composite(self, p: Job, pp: Any, *args: Any) -> None:
        if not unsupported and not host.edits_follow:
            finish_picture(p, pp)

    def postprocess(self, p: Job, processed: Processed, *args: Any) -> None:
        with ending_job(p, processed):
            ending.raise_late(p)
            if (session := session_of(p)) and processed.images:  # ADetailer calls this before there are any
                session.finish(p, processed)


def finish_picture(p: Job, pp: Any) -> None:
    """pp: with the picture that others have edited."""
    if session := session_of(p):
        with ending_job(p):
            pp.image = session.finish_picture(p, p.batch_index, pp.image)


def infotext_of(params: Any) -> str:
    """The infotext of what the host is about to save."""
    return params.pnginfo.get("parameters") or ""


def needs_png(params: Any) -> bool:
    """Whether the host is about to save a transparent picture or mask of ours, perhaps from the gallery again."""
    return params.image.mode != "RGB" and METHOD_KEY in infotext_of(params)


def must_keep_pixels(params: Any) -> bool:
    """Whether it is one of these, or a layer, which goes on into the next step as it is."""
    return needs_png(params) or outputs.picture_of(params.image) is not None


def before_saved(params: Any) -> None:
    image, text, path = params.image, infotext_of(params), Path(params.filename)
    if needs_png(params) and path != (lossless := outputs.lossless_name(path)):
        if hasattr(params.p, "comment"):
            params.p.comment(f"LayerDiffuse: saved as PNG, because {path.suffix[1:]} would lose the alpha.")
        path = lossless
    if picture := outputs.picture_of(image):
        path = outputs.named(path, outputs.dashed(picture.name), host.path_fits)
    elif METHOD_KEY in text and host.is_saved_again(params.p):
        path = outputs.named(path, outputs.ending(text), host.path_fits)
    params.filename = str(path)


def after_saved(params: Any) -> None:
    if picture := outputs.picture_of(params.image):
        path = Path(params.image.already_saved_as)  # where a file of that name was kept, this one has another
        for name, image in picture.extras.items():
            extension = host.option("samples_format") if EXTRAS[name].lossy else "png"
            text = outputs.text_of_extra(infotext_of(params), name)
            host.save_beside(params.p, image, path, f"-{name}", extension, text)


if not unsupported:
    script_callbacks.on_ui_settings(panel.add_settings)
    script_callbacks.on_before_ui(xyz_axes.add)
    script_callbacks.on_after_component(lambda component, **options: page.after_component(component))
    script_callbacks.on_before_image_saved(before_saved)
    script_callbacks.on_image_saved(after_saved)
    host.keep_pixels(must_keep_pixels)
    host.keep_alpha()
    script_callbacks.on_app_started(lambda blocks, app: host.answer_png(outputs.is_marked))
    forms = (layers.FORM, differential.FORM)
    script_callbacks.on_app_started(lambda blocks, app: host.read_args({form.title: form.posted for form in forms}))
    script_callbacks.on_app_started(lambda blocks, app: routes.register(app, extension))
    host.show_pictures()
    if host.edits_follow:
        host.finish_after_edits(finish_picture)
