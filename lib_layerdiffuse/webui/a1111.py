"""What web UIs of the A1111 family have in common: `modules`, and the jobs that it runs.

File and line in comments are of Forge's commit dfdcbab6 (lllyasviel/stable-diffusion-webui-forge).
"""

from __future__ import annotations

import base64
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from copy import copy
from functools import partial, wraps
from importlib import import_module
from importlib.util import find_spec
from inspect import getsource
from itertools import cycle, zip_longest
from pathlib import Path
from typing import Any

from modules import (
    call_queue,
    images,
    processing,
    script_callbacks,
    scripts,
    sd_models,
    sd_samplers_common,
    shared,
    ui_common,
)
from modules.paths import models_path
from modules_forge import forge_version
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from torch.nn import functional as F

from lib_layerdiffuse.engine import programs
from lib_layerdiffuse.engine.hosted import HostedModel
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.images.rgba import Box, ResizeMode, as_mask
from lib_layerdiffuse.request.layers import Request
from lib_layerdiffuse.tensors import Latent
from lib_layerdiffuse.vae import LATENT_STRIDE
from lib_layerdiffuse.webui import outputs, pictures
from lib_layerdiffuse.webui.batches import fitted
from lib_layerdiffuse.webui.changes import after, change, divert
from lib_layerdiffuse.webui.ending import end, refused
from lib_layerdiffuse.webui.host import Around
from lib_layerdiffuse.webui.job import Job, Processed
from lib_layerdiffuse.webui.script_runs import ScriptRun

log = logging.getLogger("layerdiffuse")

SAMPLING = ("sample", "sample_img2img")
PROMPTS = ("all_prompts", "all_negative_prompts", "all_hr_prompts", "all_hr_negative_prompts")  # one for each row

# What the host's numbers mean (modules/ui.py, `img2img`): ways to fill what is masked, and to resize.
FILL_SURROUNDINGS, FILL_ORIGINAL, FILL_NOISE, FILL_NOTHING = range(4)
LATENT_RESIZE = 3
MASK_SETTINGS = (
    "image_mask",
    "mask_blur",  # of Neo; others have two
    "mask_blur_x",
    "mask_blur_y",
    "mask_round",
    "inpainting_mask_invert",
    "inpaint_full_res",
    "inpainting_fill",
)

WINDOWS_PATH = 259  # characters


class WebUI:
    """See `host.Host`."""

    def __init__(self) -> None:
        self.backend = HostedModel(programs.running(), lambda: shared.sd_model)
        order = getsource(processing.process_images_inner)
        self.edits_follow = order.rindex("postprocess_image(") > order.index("postprocess_image_after_composite(")

    def name(self) -> str:
        """Neo has its number apart (`release`), others have one string."""
        return " ".join(["Stable Diffusion WebUI Forge", forge_version.version, getattr(forge_version, "release", "")])

    def api_users(self) -> list[str] | None:
        options = shared.cmd_opts
        if not (options.api or options.nowebui):
            return None
        return options.api_auth.split(",") if options.api_auth else []

    @contextmanager
    def queue(self) -> Iterator[None]:
        with call_queue.queue_lock:
            yield

    def busy(self) -> bool:
        return call_queue.queue_lock._lock.locked()

    def weight_folders(self) -> list[Path]:
        given = getattr(shared.cmd_opts, "layerdiffuse_models_dir", None)
        return [Path(folder) for folder in (given, Path(models_path) / "layer_model") if folder]

    def option(self, key: str) -> Any:
        return getattr(shared.opts, key)

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, float], None]]:
        state = shared.state
        names = ("textinfo", "job_count", "sampling_step", "sampling_steps")
        before = {name: getattr(state, name) for name in names}

        def report(text: str, fraction: float) -> None:
            state.textinfo = text
            state.job_count = max(state.job_count, 1)  # -1 before the first batch, where the bar would stand still
            state.sampling_step, state.sampling_steps = int(100 * fraction), 100

        try:
            yield report
        finally:
            for name, value in before.items():
                setattr(state, name, value)

    def interrupted(self) -> bool:
        return bool(shared.state.interrupted or shared.state.skipped)

    def stopping(self) -> bool:
        return self.interrupted() or bool(shared.state.stopping_generation)

    def fail(self, p: Job, error: Exception, processed: Processed | None = None) -> None:
        if isinstance(error, LayerDiffuseError):
            self.script_run(p).refusals[str(error)] = None
        end(p, error, processed)

    def note(self, p: Job, text: str) -> None:
        p.comment(text)
        log.info(text)

    def script_run(self, p: Job) -> ScriptRun:
        return pictures.script_run_of(p)

    def size(self, p: Job) -> tuple[int, int]:
        return p.width, p.height

    def sampler(self, p: Job) -> str:
        return p.sampler_name

    def refiner(self, p: Job) -> str | None:
        name, switch_at = getattr(p, "refiner_checkpoint", None), getattr(p, "refiner_switch_at", None)
        if name in (None, "", "None", "none") or not switch_at or switch_at >= 1:
            return None
        return f"{name} at {switch_at:g} of the steps"

    def expect(self, p: Job, times: int) -> None:
        if shared.state.job_count == -1:  # else a script such as X/Y/Z plot has counted its jobs itself
            shared.state.job_count = p.n_iter * times

    def fit_batch(self, p: Job, frames: int) -> None:
        running_seed = int(p.subseed_strength == 0)
        prompts = [getattr(p, name) for name in PROMPTS if getattr(p, name, None)]
        seeds = [seed - i * running_seed for i, seed in enumerate(p.all_seeds)]
        subseeds = [seed - i for i, seed in enumerate(p.all_subseeds)]
        p.batch_size, rows = fitted(list(zip(*prompts, seeds, subseeds)), p.batch_size, frames)
        p.n_iter = -(-len(rows) // p.batch_size)
        for name in PROMPTS:
            if before := getattr(p, name, None):
                setattr(p, name, [before[row.source] for row in rows])
        p.all_seeds = [p.all_seeds[row.source] + row.ahead * running_seed for row in rows]
        p.all_subseeds = [p.all_subseeds[row.source] + row.ahead for row in rows]

    def rows(self, p: Job) -> range:
        start = p.iteration * p.batch_size
        return range(start, start + len(p.prompts))

    def put_before_prompts(self, p: Job, texts: Sequence[str]) -> None:
        # The host reads the prompts of this batch next (parse_extra_network_prompts, processing.py:953); what it
        # records with the pictures it takes from all_prompts again, later.
        p.prompts = put_before(texts, p.prompts)
        if all_prompts := getattr(p, "all_hr_prompts", None):
            p.layerdiffuse_hr_prompts = all_prompts
            p.all_hr_prompts = put_before(texts, all_prompts)

    def restore_prompts(self, p: Job) -> None:
        if hasattr(p, "layerdiffuse_hr_prompts"):
            p.all_hr_prompts = p.layerdiffuse_hr_prompts
            del p.layerdiffuse_hr_prompts

    def run_again(self, p: Job, request: Request, sampler: str) -> Any:
        again = copy(p)
        again.layerdiffuse_request = request
        again.sampler_name = sampler
        again.do_not_save_grid = True
        # As the first run had them, whatever other scripts have done to them since the job was asked for.
        again.prompt, again.negative_prompt, again.styles = p.all_prompts, p.all_negative_prompts, []
        again.seed, again.subseed = p.all_seeds, p.all_subseeds
        if getattr(p, "enable_hr", False):
            again.hr_prompt, again.hr_negative_prompt = p.all_hr_prompts, p.all_hr_negative_prompts
        again.comments, again.extra_result_images = {}, []
        again.latents_after_sampling, again.pixels_after_sampling = [], []
        again.extra_generation_params = {
            key: value for key, value in p.extra_generation_params.items() if not key.startswith("LayerDiffuse")
        }
        with closing(again):
            return processing.process_images(again)

    def add_runs(self, p: Job, processed: Processed, runs: Sequence[Any]) -> None:
        first = processed.index_of_first_image
        for name in ("images", "infotexts"):
            own = getattr(processed, name)
            groups = zip_longest(own[first:], *(getattr(run, name)[: len(run.images)] for run in runs))
            own[first:] = [item for group in groups for item in group if item is not None]
        for run in runs:
            processed.extra_images.extend(run.extra_images)
            processed.comments += run.comments
        if has_list(p):
            processed.extra_images[:0] = one_each(processed, 1 + len(runs))

    def checkpoint_file(self, title: str | None) -> Path | None:
        info = sd_models.get_closet_checkpoint_match(title or shared.opts.sd_model_checkpoint or "")
        return Path(info.filename) if info else None

    def is_checkpoint_box(self, component: Any) -> bool:
        # Where it is none of the settings, it has no elem_id (modules_forge/main_entry.py:74).
        if getattr(component, "elem_id", "") == "setting_sd_model_checkpoint":
            return True
        return getattr(component, "label", "") == "Checkpoint" and "model_selection" in (component.elem_classes or ())

    def init_images(self, p: Job) -> list[Image.Image]:
        return list(getattr(p, "init_images", None) or [])

    def set_init_images(self, p: Job, init_images: list[Image.Image]) -> None:
        p.init_images = init_images

    def flat_init(self, p: Job, index: int) -> Image.Image:
        return images.flatten(p.init_images[index % len(p.init_images)], shared.opts.img2img_background_color)

    def init_mode(self, p: Job) -> ResizeMode | None:
        return None if p.resize_mode == LATENT_RESIZE else list(ResizeMode)[p.resize_mode]

    def start_from(self, p: Job, latents: Latent) -> None:
        latents = latents.to(p.init_latent)
        if p.resize_mode == LATENT_RESIZE:
            latents = F.interpolate(latents, size=p.init_latent.shape[2:], mode="bilinear")
        if p.mask is not None and p.inpainting_fill in (FILL_NOISE, FILL_NOTHING):  # processing.py:1824
            latents = latents * p.mask
            if p.inpainting_fill == FILL_NOISE:
                noise = processing.create_random_tensors(latents.shape[1:], p.all_seeds[: len(latents)])
                latents = latents + noise.to(latents) * p.nmask
        p.init_latent = latents

    def fills_mask(self, p: Job) -> bool:
        return p.inpainting_fill == FILL_SURROUNDINGS

    def latent_mask(self, p: Job) -> Image.Image | None:
        if p.nmask is None:
            return None
        cells = p.nmask.flatten(0, -3)[0]
        image = Image.fromarray((255 * cells).round().byte().cpu().numpy())
        return image.resize([LATENT_STRIDE * side for side in image.size], Image.Resampling.NEAREST)

    def mask(self, p: Job) -> Image.Image | None:
        given = getattr(p, "image_mask", None)
        if given is None:
            return None
        mask = as_mask(given)
        return ImageOps.invert(mask) if p.inpainting_mask_invert else mask

    def flatten_mask(self, p: Job) -> None:
        if (mask := getattr(p, "image_mask", None)) is not None:
            p.image_mask = as_mask(mask)

    def set_mask(self, p: Job, mask: Image.Image) -> None:
        p.layerdiffuse_mask = {name: vars(p)[name] for name in MASK_SETTINGS if name in vars(p)}
        if p.image_mask is None:
            p.inpaint_full_res, p.inpainting_fill = False, FILL_ORIGINAL
        p.image_mask, p.mask_blur, p.mask_round, p.inpainting_mask_invert = mask, 0, False, 0

    def restore_mask(self, p: Job) -> None:
        vars(p).update(p.layerdiffuse_mask)

    def only_masked(self, p: Job) -> bool:
        return getattr(p, "image_mask", None) is not None and bool(p.inpaint_full_res)

    def region(self, p: Job) -> Box | None:
        if not p.paste_to:
            return None
        left, upper, width, height = p.paste_to
        return left, upper, left + width, upper + height

    def steps(self, p: Job) -> int:
        return sd_samplers_common.setup_img2img_steps(p)[1] + 1

    def overlaid(self, p: Job, picture: Image.Image, overlay: Image.Image | None) -> Image.Image:
        if overlay is None:
            return picture
        answer = processing.apply_overlay(picture, p.paste_to, overlay)
        return answer[0] if isinstance(answer, tuple) else answer  # of ersatz: the picture alone

    def flatten_upscaled(self, p: Job, flatten: Callable[[Image.Image], Image.Image]) -> None:
        if (start := getattr(p, "firstpass_image", None)) is not None:
            p.firstpass_image = flatten(start)

    def upscales(self, p: Job) -> bool:
        return getattr(p, "firstpass_image", None) is not None

    @contextmanager
    def hold(
        self, p: Job, original: Latent, noise: Latent, released: Callable[[Sequence[float], float], Tensor]
    ) -> Iterator[None]:
        with self.backend.hold(original, noise, partial(released, schedule(p))):
            p.mask = p.nmask = None  # the host's own inpainting, with this map as its mask
            yield

    def around_sampling(self, p: Job, owner: str, around: Around, finished: Callable[[Latent], None]) -> None:
        # img2img keeps its sampler over batches, and the hires pass calls the hook twice: wrap each sampler once.
        if not hasattr(p.sampler, "layerdiffuse_owners"):
            p.sampler.layerdiffuse_owners = {}
            for name in SAMPLING:
                sampling = getattr(p.sampler, name)
                setattr(p.sampler, name, wrapped(sampling, p.sampler.layerdiffuse_owners))
        p.sampler.layerdiffuse_owners[owner] = around, finished

    def infotexts(self, processed: Processed) -> list[str]:
        return processed.infotexts[processed.index_of_first_image :]

    def show(self, p: Job, processed: Processed, extras: Sequence[Image.Image], frames: int) -> None:
        first, images, infotexts = processed.index_of_first_image, processed.images, processed.infotexts
        of_each = len(images[first:]) // len(infotexts[first:])  # masks follow a picture, without infotexts
        infotexts[first:] = [text for text in infotexts[first:] for _ in range(of_each)]
        if has_list(p):
            processed.extra_images.extend(one_each(processed, frames))
        if processed.index_of_first_image and getattr(p, "is_api", False):
            processed.images.append(processed.images.pop(0))  # the grid
            processed.infotexts.append(processed.infotexts.pop(0))
            processed.index_of_first_image = 0
        # Not among `images`: scripts such as SD upscale take those for the pictures that they asked for.
        processed.extra_images.extend(extras)
        pictures.tell(p, processed)

    def is_saved_again(self, p: Any) -> bool:
        # The Save button has an object of its own in the job's place, and counts from -1 (ui_common.py:73, 122).
        return type(p).__module__ == ui_common.__name__ and p.batch_index + 1 >= p.index_of_first_image

    def path_fits(self, path: Path) -> bool:
        # Forge cuts the whole path to what the file system takes of a name (images.py:740), which is a number of bytes;
        # a temporary name with an extension of four precedes the last. Windows takes 259 characters.
        extension = max(len(path.suffix), len(".tmp"))
        if hasattr(os, "statvfs"):
            most = os.statvfs(path.parent).f_namemax
            return len(str(path.with_suffix(""))) + extension <= most and len(os.fsencode(path.name)) <= most
        return len(str(path.absolute().with_suffix(""))) + extension <= WINDOWS_PATH

    def save_beside(self, p: Job, image: Image.Image, path: Path, suffix: str, extension: str, infotext: str) -> None:
        if not self.path_fits(path.with_name(f"{path.stem}{suffix}.{extension}")):
            self.note(p, f"{path.stem}{suffix} was not saved: its folder's name is too long. Choose a shorter one.")
            return
        # A copy, because the host's stealth infotext writes into the pixels of what it saves.
        saved, _ = images.save_image(
            outputs.mark(image.copy()),
            str(path.parent),
            "",
            extension=extension,
            info=infotext,
            p=p,
            forced_filename=path.stem + suffix,
            save_to_dirs=False,
        )
        image.already_saved_as = saved  # type: ignore[attr-defined]

    def pictures(self, processed: Processed) -> list[Image.Image]:
        first = processed.index_of_first_image
        images = processed.images[first:]
        return images[:: len(images) // len(processed.infotexts[first:])]  # masks may follow, without infotexts

    def save_extra(self, p: Job, processed: Processed, index: int, picture: Image.Image, name: str) -> None:
        text = outputs.text_of_extra(self.infotexts(processed)[index], name)
        processed.extra_images.append(outputs.mark(picture, infotext=text))
        if path := getattr(self.pictures(processed)[index], "already_saved_as", None):
            self.save_beside(p, picture, Path(path), f"-{name}", shared.opts.samples_format, text)

    def keep_pixels(self, condition: Callable[[Any], bool]) -> None:
        """Keep the stealth infotext, which writes over alpha or fails on other modes than RGB, off some images.

        condition: of the host's ImageSaveParams.
        """
        if find_spec("modules.stealth_infotext"):  # not in Neo and ersatz
            divert(import_module("modules.stealth_infotext"), "add_stealth_pnginfo", condition, lambda params: None)

    def read_args(self, readers: Mapping[str, Callable[[object], list[object]]]) -> None:
        # An entry without `args` would be passed over, for an ordinary picture (modules/api/api.py:359).
        from modules.api import api

        by_name = {title.lower(): read for title, read in readers.items()}

        def reading(original: Callable[..., Any]) -> Callable[..., Any]:
            def init_script_args(self: Any, request: Any, *args: Any, **options: Any) -> Any:
                entries = request.alwayson_scripts or {}
                try:
                    own = {name: {"args": by_name[name.lower()](entry)} for name, entry in entries.items()
                           if entry and name.lower() in by_name}  # fmt: skip
                except LayerDiffuseError as error:
                    raise refused(error) from error
                request.alwayson_scripts = {**entries, **own}
                return original(self, request, *args, **options)

            return init_script_args

        change(api.Api, "init_script_args", reading)

    def answer_png(self, is_ours: Callable[[Any], bool]) -> None:
        """Have the API answer with PNG for our images, whatever the format that files are saved in."""
        from modules.api import api

        divert(api, "encode_pil_to_base64", is_ours, png_base64)
        if "extra_images" not in getsource(api):  # reForge's answers with `images` alone
            after(api, "process_images", pictures.with_extras)

    def keep_alpha(self) -> None:
        """Keep the alpha of our pictures, or show what is opaque instead, in what becomes of them after a job."""
        script_callbacks.on_before_ui(pictures.keep_alpha)

    def finish_after_edits(self, finish: Callable[[Job, Any], None]) -> None:
        change(scripts.ScriptRunner, "postprocess_image", lambda original: finishing(original, finish))

    def show_pictures(self) -> None:
        """Have the page's gallery say under our pictures what they show, and know the infotext of each."""
        pictures.show_pictures()


def finishing(edit: Callable[..., None], finish: Callable[[Job, Any], None]) -> Callable[..., None]:
    """ersatz corrects colours last, and of opaque pictures only."""

    def postprocess_image(runner: Any, p: Job, pp: Any) -> None:
        edit(runner, p, pp)
        if p.color_corrections and getattr(p, "layerdiffuse", None):
            p.layerdiffuse_corrections, p.color_corrections = p.color_corrections, None
        if corrections := getattr(p, "layerdiffuse_corrections", None):
            pp.image = processing.apply_color_correction(corrections[p.batch_index], pp.image)
        finish(p, pp)

    return postprocess_image


def wrapped(
    sampling: Callable[..., Latent], owners: Mapping[str, tuple[Around, Callable[[Latent], None]]]
) -> Callable[..., Latent]:
    """The sampler's method `sample(p, noise, …)` or `sample_img2img(p, x, noise, …)`, inside what the owners give."""
    from_noise = sampling.__name__ == "sample"

    @wraps(sampling)
    def sampled(p: Job, x: Latent, second: Any, *args: Any, **kwargs: Any) -> Latent:
        noise = x if from_noise else second
        try:
            with ExitStack() as stack:
                for around, _ in owners.values():
                    stack.enter_context(around(x, noise))
                latent = sampling(p, x, second, *args, **kwargs)
        except LayerDiffuseError as error:
            pictures.script_run_of(p).refusals[str(error)] = None
            raise refused(error) from error
        for _, finished in owners.values():
            finished(latent)
        return latent

    return sampled


def schedule(p: Job) -> list[float]:
    """The sigmas that the sampler's img2img will go through, down to 0 (modules/sd_samplers_kdiffusion.py:140)."""
    steps, last = sd_samplers_common.setup_img2img_steps(p)
    if not hasattr(p.sampler, "get_timesteps"):
        return p.sampler.get_sigmas(p, steps)[steps - last - 1 :].tolist()
    alphas = p.sd_model.alphas_cumprod.cpu()[p.sampler.get_timesteps(p, steps)[:last].flip(0).cpu()]
    return [*((1 - alphas) / alphas).sqrt().tolist(), 0.0]


def has_list(p: Job) -> bool:
    """Whether a script runs a list of prompts: it then counts on one picture for each."""
    return isinstance(p.prompt, list) or isinstance(p.negative_prompt, list)


def one_each(processed: Processed, frames: int) -> list[Image.Image]:
    """Keep the first of the pictures that belong together, and return the others."""
    first = processed.index_of_first_image
    rows = list(zip(processed.images, processed.infotexts))[first:]
    others = [outputs.with_infotext(*row) for i, row in enumerate(rows) if i % frames]
    processed.images[first:] = processed.images[first::frames]
    processed.infotexts[first:] = processed.infotexts[first::frames]
    return others


def put_before(texts: Sequence[str], prompts: Sequence[str]) -> list[str]:
    return [f"{text}, {prompt}" if text else prompt for text, prompt in zip(cycle(texts), prompts)]


def png_base64(image: Image.Image) -> bytes:
    """The image as PNG with its text chunks, as the host's API encodes it."""
    text = PngInfo()
    for key, value in image.info.items():
        if isinstance(key, str) and isinstance(value, str):
            text.add_text(key, value)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=text)
    return base64.b64encode(buffer.getvalue())
