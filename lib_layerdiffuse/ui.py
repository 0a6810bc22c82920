"""The panel and the settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

import gradio as gr
from modules import shared
from modules.ui_components import InputAccordion

from lib_layerdiffuse.images import ResizeMode
from lib_layerdiffuse.methods import DEFAULT_METHOD, METHODS, Layer, Method, find_method
from lib_layerdiffuse.outputs import EXTRAS
from lib_layerdiffuse.request import Controls
from lib_layerdiffuse.vae import PASSES

TITLE = "LayerDiffuse"
DEFAULTS = Controls()

image_box = partial(gr.Image, type="numpy", image_mode="RGBA")
prompt_box = partial(gr.Textbox, lines=1, placeholder="put before the prompt, for this layer")

# How each field of Controls is shown.
PARTS: Mapping[str, Callable[[], Any]] = {
    "method": lambda: gr.Dropdown([method.label for method in METHODS], value=DEFAULTS.method, label="Method"),
    "weight": lambda: gr.Slider(0.0, 2.0, value=DEFAULTS.weight, step=0.01, label="Weight"),
    "starting_step": lambda: gr.Slider(0.0, 1.0, value=DEFAULTS.starting_step, step=0.01, label="Start At"),
    "ending_step": lambda: gr.Slider(0.0, 1.0, value=DEFAULTS.ending_step, step=0.01, label="Stop At"),
    "fg_image": lambda: image_box(label="Foreground"),
    "bg_image": lambda: image_box(label="Background"),
    "blend_image": lambda: image_box(label="Blending"),
    "resize_mode": lambda: gr.Radio(
        [mode.value for mode in ResizeMode], value=DEFAULTS.resize_mode, label="Resize Mode"
    ),
    "output_origin": lambda: gr.Checkbox(DEFAULTS.output_origin, label="Output original", visible=False),
    "fg_prompt": lambda: prompt_box(value=DEFAULTS.fg_prompt, label="Foreground prompt"),
    "bg_prompt": lambda: prompt_box(value=DEFAULTS.bg_prompt, label="Background prompt"),
    "blend_prompt": lambda: prompt_box(value=DEFAULTS.blend_prompt, label="Blending prompt"),
}

# Where: the panel's rows, from top to bottom. Another order than that of Controls, which is the API's.
ROWS = (
    ("method",),
    ("weight", "starting_step", "ending_step"),
    ("fg_image", "bg_image", "blend_image"),
    ("resize_mode", "output_origin"),
    ("fg_prompt", "bg_prompt", "blend_prompt"),
)


def panel(tab: str) -> list[Any]:
    """The components in the order of Controls; the accordion itself is the tick. tab: txt2img or img2img.

    Boxes that the chosen method has no use for are hidden; what is left in them is not used.
    """
    with InputAccordion(DEFAULTS.enabled, label=TITLE, elem_id=f"layerdiffuse-{tab}") as enabled:
        parts = {"enabled": enabled}
        for row in ROWS:
            with gr.Row():
                parts |= {name: PARTS[name]() for name in row}
        boxes = visible(DEFAULT_METHOD)
        for name, shown in boxes.items():
            parts[name].visible = shown
        parts["method"].change(
            lambda label: [gr.update(visible=shown) for shown in visible(find_method(label)).values()],
            inputs=[parts["method"]],
            outputs=[parts[name] for name in boxes],
            show_progress=False,
            queue=False,
        )
    return [parts[field.name] for field in fields(Controls)]


def visible(method: Method) -> dict[str, bool]:
    """Of each part that not all methods need: whether this one does."""
    images = {f"{layer.value}_image": layer in method.inputs for layer in Layer}
    prompts = {f"{layer.value}_prompt": layer in method.outputs for layer in Layer}
    return {**images, **prompts, "resize_mode": bool(method.inputs)}


def notice(tab: str, text: str) -> list[Any]:
    """The panel of a web UI that we cannot run in: why, and nothing else."""
    with InputAccordion(False, label=TITLE, elem_id=f"layerdiffuse-{tab}"):
        gr.Markdown(text)
    return []


def add_settings() -> None:
    """The extension's section of the settings page."""
    section = ("layerdiffuse", TITLE)
    shared.opts.add_option(
        "layerdiffuse_passes",
        shared.OptionInfo(8, "Decoder passes", gr.Radio, {"choices": list(PASSES)}, section=section).info(
            "fewer are faster; 8 give the cleanest edges"
        ),
    )
    shared.opts.add_option(
        "layerdiffuse_extras",
        shared.OptionInfo(
            ["opaque"],
            "Beside each transparent picture, show and save",
            gr.CheckboxGroup,
            {"choices": [(extra.label, name) for name, extra in EXTRAS.items()]},
            section=section,
        ),
    )
