"""The panel and the settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from modules import scripts, shared
from modules.ui_components import InputAccordion

from lib_layerdiffuse import differential
from lib_layerdiffuse.controls import Form
from lib_layerdiffuse.images import ResizeMode
from lib_layerdiffuse.methods import METHODS, Layer, Method, find_method
from lib_layerdiffuse.outputs import EXTRAS
from lib_layerdiffuse.request import FORM, Controls
from lib_layerdiffuse.vae import PASSES

TITLE = "LayerDiffuse"
AXIS = f"[{TITLE}]"
DEFAULTS = Controls()
CHANGES = differential.Controls()

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
    """The components in the order of Controls; the accordion itself is the tick. tab: txt2img or img2img."""
    with InputAccordion(DEFAULTS.enabled, label=TITLE, elem_id=f"layerdiffuse-{tab}") as enabled:
        parts = {"enabled": enabled}
        for row in ROWS:
            with gr.Row():
                parts |= {name: PARTS[name]() for name in row}
        show_what_is_used(parts, "method", lambda label: visible(find_method(label)))
    return [parts[field.name] for field in fields(Controls)]


CHANGE_PARTS: Mapping[str, Callable[[], Any]] = {
    "source": lambda: gr.Dropdown(list(differential.SOURCES), value=CHANGES.source, label="Change map"),
    "map_image": lambda: image_box(
        label="Map: white changes, black stays (the paper has it the other way round)", height=320
    ),
    "softness": lambda: gr.Slider(0, 256, value=CHANGES.softness, step=1, label="Softness (pixels)"),
    "columns": lambda: gr.Slider(2, 16, value=CHANGES.columns, step=1, label="Columns"),
}


def change_panel() -> list[Any]:
    """Differential Diffusion's components, in the order of its controls."""
    with InputAccordion(False, label=differential.TITLE, elem_id="differential-img2img") as enabled:
        gr.Markdown("A denoising strength for every pixel: white is the strength set above, black stays as it is.")
        parts = {"enabled": enabled} | {name: make() for name, make in CHANGE_PARTS.items()}
        show_what_is_used(parts, "source", differential.uses)
    return [parts[field.name] for field in fields(differential.Controls)]


def show_what_is_used(parts: Mapping[str, Any], chooser: str, used: Callable[[str], Mapping[str, bool]]) -> None:
    """Hide the parts that the choice has no use for; what is left in them is not used."""
    boxes = used(parts[chooser].value)
    for name, shown in boxes.items():
        parts[name].visible = shown
    parts[chooser].change(
        lambda choice: [gr.update(visible=shown) for shown in used(choice).values()],
        inputs=[parts[chooser]],
        outputs=[parts[name] for name in boxes],
        show_progress=False,
        queue=False,
    )


def visible(method: Method) -> dict[str, bool]:
    """Of each part that not all methods need: whether this one does."""
    images = {f"{layer.value}_image": layer in method.inputs for layer in Layer}
    prompts = {f"{layer.value}_prompt": layer in method.outputs for layer in Layer}
    return {**images, **prompts, "resize_mode": bool(method.inputs)}


def paste_fields(form: Form, components: Sequence[Any]) -> list[tuple[Any, Callable[[Mapping[str, Any]], Any]]]:
    """How the web UI puts a picture's parameters back into the panel's components."""
    names = (field.name for field in fields(form.controls))
    return [(component, partial(form.pasted, name)) for name, component in zip(names, components, strict=True)]


# What an X/Y/Z plot can vary: a control, the type of its values, and what they are chosen from.
AXES: Sequence[tuple[str, type, Callable[[], list[str]] | None]] = (
    ("method", str, lambda: [method.label for method in METHODS]),
    ("weight", float, None),
    ("starting_step", float, None),
    ("ending_step", float, None),
)


def add_axes() -> None:
    """Put them at the end of the plot's list, unless they are there: Reload UI calls this again."""
    for data in scripts.scripts_data:
        plot = data.module
        if Path(data.path).name != "xyz_grid.py" or any(option.label.startswith(AXIS) for option in plot.axis_options):
            continue
        for name, kind, choices in AXES:
            plot.axis_options.append(plot.AxisOption(f"{AXIS} {FORM.label(name)}", kind, change(name), choices=choices))


def change(name: str) -> Callable[[Any, Any, Any], None]:
    """What a plot does to the job of one of its cells, a copy of its own job."""

    def apply(p: Any, value: Any, values: Any) -> None:
        p.layerdiffuse_axes = {**getattr(p, "layerdiffuse_axes", {}), name: value}

    return apply


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
