"""Stable Diffusion WebUI Forge 2 (`backend` package): lllyasviel/stable-diffusion-webui-forge.

File and line in comments are of commit dfdcbab6.
"""

from __future__ import annotations

import base64
import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from copy import copy
from functools import wraps
from itertools import cycle, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from weakref import ref

import torch
from backend import memory_management
from backend.patcher.base import ModelPatcher
from backend.patcher.lora import load_lora
from fastapi import HTTPException
from modules import (
    call_queue,
    images,
    processing,
    script_callbacks,
    sd_models,
    sd_samplers_common,
    shared,
    stealth_infotext,
    ui_common,
)
from modules.paths import models_path
from modules_forge import forge_version
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn
from torch.nn import functional as F

from lib_layerdiffuse import outputs
from lib_layerdiffuse.batches import fitted
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.hosts import pictures
from lib_layerdiffuse.hosts.base import Around, BaseModel
from lib_layerdiffuse.hosts.changes import change, divert
from lib_layerdiffuse.images import Box, ResizeMode, as_mask
from lib_layerdiffuse.injection import Injection, WeightPatch, misfit
from lib_layerdiffuse.memory import return_freed_memory
from lib_layerdiffuse.methods import Family
from lib_layerdiffuse.nets.attention_sharing import ATTENTIONS, BLOCKS, FoldedSharing
from lib_layerdiffuse.patches import (
    Controls,
    Layers,
    Patch,
    Switch,
    attention_patches,
    condition_patch,
    control_patches,
)
from lib_layerdiffuse.request import Request
from lib_layerdiffuse.scripted import ScriptRun
from lib_layerdiffuse.tensors import Latent, Rgb

log = logging.getLogger("layerdiffuse")

# What the host calls on `p` next, outside the hooks whose exceptions it swallows (modules/processing.py):
# before sampling (`init` 921, `sample` 989), and after it (`save_samples` 1034, infotext of each picture 751).
NEXT_STEPS = ("init", "sample", "save_samples", "get_token_merging_ratio")
SAMPLING = ("sample", "sample_img2img")
PROMPTS = ("all_prompts", "all_negative_prompts", "all_hr_prompts", "all_hr_negative_prompts")  # one for each row

# What the host's numbers mean (modules/ui.py, `img2img`): ways to fill what is masked, and to resize.
FILL_SURROUNDINGS, FILL_ORIGINAL, FILL_NOISE, FILL_NOTHING = range(4)
LATENT_RESIZE = 3
MASK_SETTINGS = (
    "image_mask",
    "mask_blur_x",
    "mask_blur_y",
    "mask_round",
    "inpainting_mask_invert",
    "inpaint_full_res",
    "inpainting_fill",
)

# The engine's flag, what it says, and the family that LayerDiffuse has weights for.
KINDS = (
    ("is_sd1", "an SD1.5", Family.SD15),
    ("is_sdxl", "an SDXL", Family.SDXL),
    ("is_sd2", "an SD2", None),
    ("is_sd3", "an SD3", None),
)
OTHER_KIND = ("", "a Flux or other", None)
WINDOWS_PATH = 259  # characters
REFINER_CONTEXT = 1280  # width of the text context of the SDXL refiner; the base model has 2048


class RefusedJob(LayerDiffuseError, HTTPException):
    """The page shows its name and text; the API answers HTTP 422 with the text as `detail`."""

    def __init__(self, error: LayerDiffuseError) -> None:
        HTTPException.__init__(self, status_code=422, detail=str(error))

    def __str__(self) -> str:
        return str(self.detail)


RefusedJob.__name__ = "LayerDiffuse"


class BackendHost:
    """Forge 2; see `base.Host`."""

    def name(self) -> str:
        return f"Stable Diffusion WebUI Forge {forge_version.version}"

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

    def fail(self, p: Any, error: Exception, processed: Any = None) -> None:
        raised = refused(error)

        def end_job(*args: Any, **kwargs: Any) -> Any:
            raise raised

        if isinstance(error, LayerDiffuseError):
            self.script_run(p).refusals[str(error)] = None
        for step in NEXT_STEPS:
            setattr(p, step, end_job)
        if processed is not None:
            processed.js = end_job  # asked for by page and API alike, when all is done

    def note(self, p: Any, text: str) -> None:
        p.comment(text)
        log.info(text)

    def script_run(self, p: Any) -> ScriptRun:
        return pictures.script_run_of(p)

    def size(self, p: Any) -> tuple[int, int]:
        return p.width, p.height

    def sampler(self, p: Any) -> str:
        return p.sampler_name

    def refiner(self, p: Any) -> str | None:
        name, switch_at = getattr(p, "refiner_checkpoint", None), getattr(p, "refiner_switch_at", None)
        if name in (None, "", "None", "none") or not switch_at or switch_at >= 1:
            return None
        return f"{name} at {switch_at:g} of the steps"

    def expect(self, p: Any, times: int) -> None:
        if shared.state.job_count == -1:  # else a script such as X/Y/Z plot has counted its jobs itself
            shared.state.job_count = p.n_iter * times

    def fit_batch(self, p: Any, frames: int) -> None:
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

    def rows(self, p: Any) -> range:
        start = p.iteration * p.batch_size
        return range(start, start + len(p.prompts))

    def put_before_prompts(self, p: Any, texts: Sequence[str]) -> None:
        # The host reads the prompts of this batch next (parse_extra_network_prompts, processing.py:953); what it
        # records with the pictures it takes from all_prompts again, later.
        p.prompts = put_before(texts, p.prompts)
        if all_prompts := getattr(p, "all_hr_prompts", None):
            p.layerdiffuse_hr_prompts = all_prompts
            p.all_hr_prompts = put_before(texts, all_prompts)

    def restore_prompts(self, p: Any) -> None:
        if hasattr(p, "layerdiffuse_hr_prompts"):
            p.all_hr_prompts = p.layerdiffuse_hr_prompts
            del p.layerdiffuse_hr_prompts

    def posterior(self, p: Any, rgb: Rgb) -> tuple[Latent, Latent]:
        vae = p.sd_model.forge_objects.vae.clone()
        encode = vae.first_stage_model.encode
        # Not the VAE's regulation, which its tiled mode leaves out (backend/patcher/vae.py:118).
        vae.first_stage_model = SimpleNamespace(encode=lambda pixels, regulation=None: encode(pixels, parameters_of))
        vae.latent_channels *= 2
        mean, deviation = vae.encode(rgb.movedim(1, -1)).chunk(2, dim=1)
        return mean, deviation

    def sampler_latent(self, p: Any, vae_latent: Latent) -> Latent:
        return p.sd_model.forge_objects.vae.first_stage_model.process_in(vae_latent)

    def run_again(self, p: Any, request: Request, sampler: str) -> Any:
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

    def add_runs(self, p: Any, processed: Any, runs: Sequence[Any]) -> None:
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

    def base_model(self, p: Any) -> BaseModel:
        model = p.sd_model
        _, kind, family = next((row for row in KINDS if getattr(model, row[0], False)), OTHER_KIND)
        refiner = getattr(model.model_config, "unet_config", {}).get("context_dim") == REFINER_CONTEXT
        special = "inpainting " * model.is_inpaint + "refiner " * refiner
        name = model.sd_checkpoint_info.name_for_extra
        return BaseModel(name, f"{kind} {special}checkpoint", None if special else family)

    def checkpoint_file(self, title: str | None) -> Path | None:
        info = sd_models.get_closet_checkpoint_match(title or shared.opts.sd_model_checkpoint or "")
        return Path(info.filename) if info else None

    def is_checkpoint_box(self, component: Any) -> bool:
        # It has no elem_id (modules_forge/main_entry.py:74).
        return getattr(component, "label", "") == "Checkpoint" and "model_selection" in (component.elem_classes or ())

    def init_images(self, p: Any) -> list[Image.Image]:
        return list(getattr(p, "init_images", None) or [])

    def set_init_images(self, p: Any, init_images: list[Image.Image]) -> None:
        p.init_images = init_images

    def flat_init(self, p: Any, index: int) -> Image.Image:
        return images.flatten(p.init_images[index % len(p.init_images)], shared.opts.img2img_background_color)

    def init_mode(self, p: Any) -> ResizeMode | None:
        return None if p.resize_mode == LATENT_RESIZE else list(ResizeMode)[p.resize_mode]

    def start_from(self, p: Any, latents: Latent) -> None:
        latents = latents.to(p.init_latent)
        if p.resize_mode == LATENT_RESIZE:
            latents = F.interpolate(latents, size=p.init_latent.shape[2:], mode="bilinear")
        if p.mask is not None and p.inpainting_fill in (FILL_NOISE, FILL_NOTHING):  # processing.py:1824
            latents = latents * p.mask
            if p.inpainting_fill == FILL_NOISE:
                noise = processing.create_random_tensors(latents.shape[1:], p.all_seeds[: len(latents)])
                latents = latents + noise.to(latents) * p.nmask
        p.init_latent = latents

    def fills_mask(self, p: Any) -> bool:
        return p.inpainting_fill == FILL_SURROUNDINGS

    def mask(self, p: Any) -> Image.Image | None:
        if getattr(p, "image_mask", None) is None:
            return None
        mask = as_mask(p.image_mask)
        return ImageOps.invert(mask) if p.inpainting_mask_invert else mask

    def flatten_mask(self, p: Any) -> None:
        if getattr(p, "image_mask", None) is not None:
            p.image_mask = as_mask(p.image_mask)

    def set_mask(self, p: Any, mask: Image.Image) -> None:
        p.layerdiffuse_mask = {name: getattr(p, name) for name in MASK_SETTINGS}
        if p.image_mask is None:
            p.inpaint_full_res, p.inpainting_fill = False, FILL_ORIGINAL
        p.image_mask, p.mask_blur_x, p.mask_blur_y, p.mask_round, p.inpainting_mask_invert = mask, 0, 0, False, 0

    def restore_mask(self, p: Any) -> None:
        vars(p).update(p.layerdiffuse_mask)

    def only_masked(self, p: Any) -> bool:
        return getattr(p, "image_mask", None) is not None and bool(p.inpaint_full_res)

    def region(self, p: Any) -> Box | None:
        if not p.paste_to:
            return None
        left, upper, width, height = p.paste_to
        return left, upper, left + width, upper + height

    def steps(self, p: Any) -> int:
        return sd_samplers_common.setup_img2img_steps(p)[1] + 1

    def overlaid(self, p: Any, picture: Image.Image, overlay: Image.Image | None) -> Image.Image:
        return processing.apply_overlay(picture, p.paste_to, overlay)[0]

    def flatten_upscaled(self, p: Any, flatten: Callable[[Image.Image], Image.Image]) -> None:
        if self.upscales(p):
            p.firstpass_image = flatten(p.firstpass_image)

    def upscales(self, p: Any) -> bool:
        return getattr(p, "firstpass_image", None) is not None

    def around_sampling(self, p: Any, owner: str, around: Around, finished: Callable[[Latent], None]) -> None:
        # img2img keeps its sampler over batches, and the hires pass calls the hook twice: wrap each sampler once.
        if not hasattr(p.sampler, "layerdiffuse_owners"):
            p.sampler.layerdiffuse_owners = {}
            for name in SAMPLING:
                sampling = getattr(p.sampler, name)
                setattr(p.sampler, name, wrapped(sampling, p.sampler.layerdiffuse_owners))
        p.sampler.layerdiffuse_owners[owner] = around, finished

    @contextmanager
    def hold(
        self, p: Any, original: Latent, noise: Latent, released: Callable[[Sequence[float], float], Tensor]
    ) -> Iterator[None]:
        objects = p.sd_model.forge_objects
        unet = objects.unet.clone()
        with_noise = unet.model.predictor.noise_scaling
        sigmas = schedule(p)
        free: Tensor | None = None  # at the model call under way

        def before(model: Any, x: Latent, timestep: Any, uncond: Any, cond: Any, *rest: Any) -> tuple[Any, ...]:
            nonlocal free
            free = released(sigmas, float(timestep[0])).to(x.device).expand(len(x), -1, -1, -1)
            kept = with_noise(timestep[:, None, None, None], noise.to(x), original.to(x))
            for condition in (*(uncond or ()), *cond):
                release_inpainting(condition["model_conds"], original, free)
            return model, torch.where(free, x, kept), timestep, uncond, cond, *rest

        def after(args: Mapping[str, Any]) -> Latent:
            assert free is not None, "an answer of the UNet before its call"
            return torch.where(free, args["denoised"], original.to(args["denoised"]))

        unet.add_conditioning_modifier(before)
        unet.set_model_sampler_post_cfg_function(after)
        p.mask = p.nmask = None  # the host's own inpainting, with this map as its mask
        objects.unet = unet
        yield

    @contextmanager
    def inject(self, p: Any, injection: Injection, request: Request, condition: Tensor | None) -> Iterator[None]:
        objects = p.sd_model.forge_objects
        unet = objects.unet.clone()
        plain = merged = dict(unet.lora_patches)
        # Weakly, because it holds `merge`: together they would keep gigabytes until the next garbage collection.
        patcher = ref(unet)

        def merge(on: bool) -> None:
            start = time.perf_counter()
            unet: Any = patcher()
            unet.lora_patches = merged if on else plain
            unet.lora_loader.refresh(unet.lora_patches, offload_device=unet.offload_device)
            log.info("switched %s in %.2f s", "on" if on else "off", time.perf_counter() - start)

        begin, end = map(unet.model.predictor.percent_to_sigma, (request.starting_step, request.ending_step))
        switch = Switch(begin, end, merge, on=request.starting_step == 0)
        afterwards = ExitStack()
        if isinstance(injection.content, WeightPatch):
            patch_weights(unet, injection, injection.content, request.weight)
            merged = unet.lora_patches
            if not switch.on:  # merged when it is time
                unet.lora_patches = plain
            patches = condition_patches(injection.content, condition, request.weight, switch)
        else:
            patches = sharing_patches(unet, injection.content, condition, request.weight, switch, afterwards)
        add_patches(unet, patches)
        unet.add_conditioning_modifier(each_step(switch))
        # Not put back afterwards: the host drops it at its next reset (processing.py:937), and a patcher that nothing
        # refers to any more is forgotten by its memory management while the model still is on the GPU.
        objects.unet = unet
        try:
            with afterwards:
                yield
        except BaseException:
            # A merge that broke off is neither undone nor noticed by the host (backend/patcher/lora.py:354).
            unet.lora_loader.refresh(plain, offload_device=unet.offload_device, force_refresh=True)
            raise

    def vae_latent(self, p: Any, sampler_latent: Latent) -> Latent:
        return p.sd_model.forge_objects.vae.first_stage_model.process_out(sampler_latent)

    def places(self, module: nn.Module, memory: int) -> Iterator[torch.device]:
        patcher = patcher_of(module, dtype_for(memory_management.get_torch_device()))
        memory_management.load_models_gpu([patcher], memory_required=memory)
        yield patcher.load_device
        if memory_management.is_device_cpu(patcher.load_device):
            return
        log.info("out of memory: once more with nothing else on the GPU")
        memory_management.unload_all_models()
        memory_management.load_models_gpu([patcher], memory_required=memory)
        yield patcher.load_device
        log.info("out of memory: once more on the CPU")
        memory_management.unload_all_models()
        dtype = next(module.parameters()).dtype
        module.float()
        try:
            yield torch.device("cpu")
        finally:
            module.to(dtype)

    def forget(self, injection: Injection) -> None:
        # What refers back to the module would keep it, a gigabyte on a CPU, until the next garbage collection: its
        # patcher, and what the host's patcher puts on it (backend/patcher/base.py:64).
        attributes = vars(injection.content)
        if patcher := attributes.pop("host_patcher", None):
            memory_management.unload_model_clones(patcher)
            del attributes["lora_loader"]

    def return_memory(self) -> None:
        return_freed_memory()

    def infotexts(self, processed: Any) -> list[str]:
        return processed.infotexts[processed.index_of_first_image :]

    def show(self, p: Any, processed: Any, extras: Sequence[Image.Image], frames: int) -> None:
        first, images, infotexts = processed.index_of_first_image, processed.images, processed.infotexts
        of_each = len(images[first:]) // len(infotexts[first:])  # masks follow a picture, without infotexts
        infotexts[first:] = [text for text in infotexts[first:] for _ in range(of_each)]
        if has_list(p):
            processed.extra_images.extend(one_each(processed, frames))
        if processed.index_of_first_image and getattr(p, "is_api", False):
            for items in (processed.images, processed.infotexts):
                items.append(items.pop(0))  # the grid
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

    def save_beside(self, p: Any, image: Image.Image, path: Path, suffix: str, extension: str, infotext: str) -> None:
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

    def pictures(self, processed: Any) -> list[Image.Image]:
        first = processed.index_of_first_image
        images = processed.images[first:]
        return images[:: len(images) // len(processed.infotexts[first:])]  # masks may follow, without infotexts

    def save_extra(self, p: Any, processed: Any, index: int, picture: Image.Image, name: str) -> None:
        text = outputs.text_of_extra(self.infotexts(processed)[index], name)
        processed.extra_images.append(outputs.mark(picture, infotext=text))
        if path := getattr(self.pictures(processed)[index], "already_saved_as", None):
            self.save_beside(p, picture, Path(path), f"-{name}", shared.opts.samples_format, text)

    def keep_pixels(self, condition: Callable[[Any], bool]) -> None:
        """Keep the stealth infotext, which writes over alpha or fails on other modes than RGB, off some images.

        condition: of the host's ImageSaveParams.
        """
        divert(stealth_infotext, "add_stealth_pnginfo", condition, lambda params: None)

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

    def keep_alpha(self) -> None:
        """Keep the alpha of our pictures, or show what is opaque instead, in what becomes of them after a job."""
        script_callbacks.on_before_ui(pictures.keep_alpha)

    def show_pictures(self) -> None:
        """Have the page's gallery say under our pictures what they show, and know the infotext of each."""
        pictures.show_pictures()


def wrapped(
    sampling: Callable[..., Latent], owners: Mapping[str, tuple[Around, Callable[[Latent], None]]]
) -> Callable[..., Latent]:
    """The sampler's method `sample(p, noise, …)` or `sample_img2img(p, x, noise, …)`, inside what the owners give."""
    from_noise = sampling.__name__ == "sample"

    @wraps(sampling)
    def sampled(p: Any, x: Latent, second: Any, *args: Any, **kwargs: Any) -> Latent:
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


def schedule(p: Any) -> list[float]:
    """The sigmas that the sampler's img2img will go through, down to 0 (modules/sd_samplers_kdiffusion.py:140)."""
    steps, last = sd_samplers_common.setup_img2img_steps(p)
    if not hasattr(p.sampler, "get_timesteps"):
        return p.sampler.get_sigmas(p, steps)[steps - last - 1 :].tolist()
    alphas = p.sd_model.alphas_cumprod.cpu()[p.sampler.get_timesteps(p, steps)[:last].flip(0).cpu()]
    return [*((1 - alphas) / alphas).sqrt().tolist(), 0.0]


def release_inpainting(conditions: dict[str, Any], original: Latent, free: Tensor) -> None:
    """Tell an inpainting checkpoint what is masked now: its mask, and the latents of the picture without that part."""
    if mask_and_latents := conditions.get("c_concat"):
        latents = mask_and_latents.cond[:, 1:]
        now = torch.cat([free.to(latents), torch.where(free, latents, original.to(latents))], dim=1)
        conditions["c_concat"] = type(mask_and_latents)(now)


def has_list(p: Any) -> bool:
    """Whether a script runs a list of prompts: it then counts on one picture for each."""
    return isinstance(p.prompt, list) or isinstance(p.negative_prompt, list)


def one_each(processed: Any, frames: int) -> list[Image.Image]:
    """Keep the first of the pictures that belong together, and return the others."""
    first = processed.index_of_first_image
    rows = list(zip(processed.images, processed.infotexts))[first:]
    others = [outputs.with_infotext(*row) for i, row in enumerate(rows) if i % frames]
    for items in (processed.images, processed.infotexts):
        items[first:] = items[first::frames]
    return others


def each_step(switch: Switch) -> Callable[..., tuple[Any, ...]]:
    """A conditioning modifier that changes nothing and tells the switch where sampling is."""

    def modifier(model: Any, x: Any, timestep: Any, *rest: Any) -> tuple[Any, ...]:
        switch.at(float(timestep[0]))
        return model, x, timestep, *rest

    return modifier


def patch_weights(unet: Any, injection: Injection, patch: WeightPatch, weight: float) -> None:
    """Hand LoRA and diff to the host's own patcher, and make sure that it takes all of them."""
    refuse_unfit(unet, injection, patch)
    files = {
        f"{key}.lora_{name}.weight": t for key, pair in patch.lora.items() for name, t in zip(("up", "down"), pair)
    }
    patches, _ = load_lora(files, {key: key for key in patch.lora})
    patches |= {key: ("diff", (diff,)) for key, diff in patch.diff.items()}
    applied = unet.add_patches(filename=f"layerdiffuse {injection.identity}", patches=patches, strength_patch=weight)
    if lost := patch.shapes().keys() - applied:
        raise misfit(injection.method, f"Forge took no patch for {len(lost)} of its weights, such as {min(lost)}")
    if unet.lora_loader.loaded_hash != str(list(unet.lora_patches)):  # what the host compares before it merges
        log.info("merging %s at weight %g", injection.method.weights, weight)


def refuse_unfit(unet: Any, injection: Injection, patch: WeightPatch) -> None:
    """Before the host touches a weight: it would stop half-way, and leave the first half merged."""
    found = dict(unet.model.named_parameters())
    if any(hasattr(weight, mark) for weight in found.values() for mark in ("bnb_quantized", "gguf_cls")):
        raise LayerDiffuseError(
            f"{injection.method.full_title} adds to the weights of the UNet, which is quantised (NF4 or GGUF) in this "
            "checkpoint. Choose a checkpoint in fp16, bf16 or fp8."
        )
    if reason := patch.misfit(found):
        raise misfit(injection.method, reason)


def condition_patches(patch: WeightPatch, latents: Latent | None, weight: float, switch: Switch) -> list[Patch]:
    if patch.condition is None or latents is None:
        return []
    return [condition_patch(patch.condition, latents, weight, switch)]


def sharing_patches(
    unet: Any, sharing: FoldedSharing, picture: Rgb | None, weight: float, switch: Switch, afterwards: ExitStack
) -> list[Patch]:
    """The units for the UNet's attention layers, which are loaded together with it."""
    unet.add_extra_model_patcher_during_sampling(patcher_of(sharing, unet.model.computation_dtype))
    hosts = {(name, block): getattr(transformer(unet, block), name) for name in ATTENTIONS for block in BLOCKS}
    loader = unet.lora_loader
    layers = Layers(sharing, hosts, weight, version=lambda: loader.loaded_hash)
    afterwards.callback(layers.clear)  # the patched UNet itself stays until the next job
    control = [] if picture is None else control_patches(Controls(sharing, picture, weight), switch)
    return [*attention_patches(layers, switch), *control]


def add_patches(unet: Any, patches: Sequence[Patch]) -> None:
    lists = unet.model_options["transformer_options"].setdefault("patches", {})
    for patch in patches:
        others = lists.get(patch.kind, [])
        lists[patch.kind] = [patch.call, *others] if patch.first else [*others, patch.call]


def parameters_of(posterior: Any) -> Tensor:
    """A regulation of the host's VAE: both mean and deviation instead of a sample."""
    return torch.cat([posterior.mean, posterior.std], dim=1)


def put_before(texts: Sequence[str], prompts: Sequence[str]) -> list[str]:
    return [f"{text}, {prompt}" if text else prompt for text, prompt in zip(cycle(texts), prompts)]


def refused(error: Exception) -> Exception:
    return RefusedJob(error) if isinstance(error, LayerDiffuseError) else error


def transformer(unet: Any, block: tuple[str, int]) -> nn.Module:
    """The host's transformer block: SD1.5 has one for each position, after the ResNet."""
    name, index = block
    model = unet.model.diffusion_model
    stage = model.middle_block if name == "middle" else getattr(model, f"{name}_blocks")[index]
    return stage[1].transformer_blocks[0]


def patcher_of(module: nn.Module, dtype: torch.dtype) -> ModelPatcher:
    """The host's handle for loading `module`, kept on the module: hosts hold handles weakly."""
    module.to(dtype)
    if "host_patcher" not in module.__dict__:
        module.host_patcher = ModelPatcher(
            module,
            load_device=memory_management.get_torch_device(),
            offload_device=memory_management.unet_offload_device(),
        )
    return module.host_patcher


def dtype_for(device: torch.device) -> torch.dtype:
    if memory_management.should_use_fp16(device):
        return torch.float16
    return torch.bfloat16 if memory_management.should_use_bf16(device) else torch.float32


def png_base64(image: Image.Image) -> bytes:
    """The image as PNG with its text chunks, as the host's API encodes it."""
    text = PngInfo()
    for key, value in image.info.items():
        if isinstance(key, str) and isinstance(value, str):
            text.add_text(key, value)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=text)
    return base64.b64encode(buffer.getvalue())
