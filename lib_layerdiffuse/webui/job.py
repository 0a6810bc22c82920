"""What a web UI of the A1111 family calls a job, as far as the extension reads and writes it.

The host's classes are `StableDiffusionProcessing` and `Processed` (modules/processing.py); these only name their
attributes. Some hosts and jobs lack some of them: those are asked for with `getattr`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from PIL import Image
from torch import Tensor


class Job(Protocol):
    """One job (`p`): what was asked for, and how far it has come."""

    # Asked for
    prompt: str | list[str]
    negative_prompt: str | list[str]
    styles: list[str]
    seed: int | list[int]
    subseed: int | list[int]
    subseed_strength: float
    sampler_name: str
    width: int
    height: int
    batch_size: int
    n_iter: int  # batches
    denoising_strength: float
    do_not_save_grid: bool
    extra_generation_params: dict[str, Any]  # of the infotext
    hr_prompt: str | list[str]
    hr_negative_prompt: str | list[str]

    # Of img2img
    init_images: list[Image.Image]
    resize_mode: int
    image_mask: Image.Image | None
    mask_blur: int  # in both directions
    mask_round: bool
    inpainting_fill: int
    inpainting_mask_invert: int
    inpaint_full_res: bool
    firstpass_image: Image.Image | None  # the upscale button's

    # Under way: one of each row of the job
    all_prompts: list[str]
    all_negative_prompts: list[str]
    all_hr_prompts: list[str]
    all_hr_negative_prompts: list[str]
    all_seeds: list[int]
    all_subseeds: list[int]

    # Under way: the batch
    iteration: int
    batch_index: int
    prompts: list[str]
    sampler: Any
    sd_model: Any
    init_latent: Tensor
    mask: Tensor | None
    nmask: Tensor | None
    paste_to: tuple[int, int, int, int] | None
    color_corrections: Any
    comments: dict[str, int]
    extra_result_images: list[Image.Image]
    latents_after_sampling: list[Tensor]
    pixels_after_sampling: list[Tensor]

    # The extension's own
    layerdiffuse: Any  # Session | None
    layerdiffuse_request: Any  # Request, of a further step of a chain
    layerdiffuse_axes: dict[str, Any]  # what an X/Y/Z plot varies
    layerdiffuse_script: Any  # ScriptRun
    layerdiffuse_hr_prompts: list[str]
    layerdiffuse_error: Exception | None  # what a hook ended it with
    layerdiffuse_mask: dict[str, Any]
    layerdiffuse_corrections: Any  # of colours, where the host would make them after the extension
    differential: Any  # ChangeSession | None

    def comment(self, text: str) -> None: ...

    def close(self) -> None: ...


class Processed(Protocol):
    """What a job made."""

    images: list[Image.Image]
    extra_images: list[Image.Image]  # shown behind them
    infotexts: list[str]
    index_of_first_image: int  # 1 where a grid precedes them
    comments: str
    extra_generation_params: dict[str, Any]
    info: str
    js: Callable[..., str]
