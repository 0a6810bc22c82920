"""The panels, what happens between them and the page around them, and the settings."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context
from modules import shared
from modules.ui_components import InputAccordion, ToolButton

from lib_layerdiffuse.images.extras import EXTRAS
from lib_layerdiffuse.images.rgba import ResizeMode
from lib_layerdiffuse.methods import (
    METHODS,
    Family,
    Layer,
    Method,
    counterpart,
    find_method,
    methods_of,
    needed_files,
    taking,
)
from lib_layerdiffuse.request import differential
from lib_layerdiffuse.request.form import Form
from lib_layerdiffuse.request.layers import AS_IN_SETTINGS, FORM
from lib_layerdiffuse.vae import PASSES
from lib_layerdiffuse.version import own_version
from lib_layerdiffuse.webui.extension import Extension
from lib_layerdiffuse.webui.gradio_kinds import AT_ONCE, IMAGE, IS_NEWER, RESULT, worded_choices
from lib_layerdiffuse.webui.status_line import Sentence, forecast
from lib_layerdiffuse.weights.downloads import State, Status

TITLE = "LayerDiffuse"
TABS = ("txt2img", "img2img")
LOCALIZATIONS = Path(__file__).resolve().parents[2] / "localizations"
LOOK_S = 0.5  # between two looks at a download


def value_of(method: Method) -> str:
    """What stands for a method in the list: what infotexts and saved defaults say, or what the list itself says."""
    return method.label if IS_NEWER else method.full_title


image_box = partial(gr.Image, type="numpy", image_mode="RGBA", height=320, **IMAGE)
prompt_box = partial(gr.Textbox, lines=1, placeholder="for this layer alone")

# How each field of Controls is shown.
PARTS: Mapping[str, Callable[..., Any]] = {
    # Labels until the page is loaded: the web UI drops a saved default that the list does not say (ui_loadsave.py:101).
    "method": partial(gr.Dropdown, [value_of(method) for method in METHODS], scale=4),
    "weight": partial(gr.Slider, 0.0, 2.0, step=0.01),
    "starting_step": partial(gr.Slider, 0.0, 1.0, step=0.01),
    "ending_step": partial(gr.Slider, 0.0, 1.0, step=0.01),
    "fg_image": image_box,
    "bg_image": image_box,
    "blend_image": image_box,
    "resize_mode": partial(gr.Radio, [mode.value for mode in ResizeMode]),
    "output_origin": partial(gr.Checkbox, visible=False),
    "fg_prompt": prompt_box,
    "bg_prompt": prompt_box,
    "blend_prompt": prompt_box,
    "passes": partial(gr.Dropdown, [AS_IN_SETTINGS, *map(str, PASSES)]),
    "grey_background": gr.Checkbox,
}

# Where: the panel's rows, from top to bottom. Another order than that of Controls, which is the API's.
ROWS = (
    ("weight", "starting_step", "ending_step"),
    ("fg_image", "bg_image", "blend_image"),
    ("resize_mode", "output_origin"),
    ("fg_prompt", "bg_prompt", "blend_prompt"),
    ("passes", "grey_background"),
)

CHANGE_PARTS: Mapping[str, Callable[..., Any]] = {
    "source": partial(gr.Dropdown, list(differential.SOURCES)),
    "map_image": image_box,
    "softness": partial(gr.Slider, 0, 256, step=1),
    "columns": partial(gr.Slider, 2, 16, step=1),
}

QUICK = {"show_progress": False, "queue": False}  # events that need no place in the queue


def part(form: Form, makers: Mapping[str, Callable[..., Any]], name: str, panel: str) -> Any:
    """The component of a control, to be found on the page as `<panel>-<name>`."""
    return makers[name](
        value=form.default(name), label=form.label(name), elem_id=f"{panel}-{name}", tooltip=form.hint(name)
    )


SEND = {
    Layer.FG: ("🧍", "Send image to LayerDiffuse as foreground."),
    Layer.BG: ("🏞️", "Send image to LayerDiffuse as background."),
    Layer.BLEND: ("🧩", "Send image to LayerDiffuse as blend."),
}


class Panel:
    """The panel of one tab."""

    def __init__(self, tab: str, extension: Extension) -> None:
        self.tab = tab
        self.extension = extension
        panel = f"layerdiffuse-{tab}"
        with InputAccordion(FORM.default("enabled"), label=TITLE, elem_id=panel) as enabled:
            self.parts = {"enabled": enabled}
            with gr.Row():
                self.parts["method"] = part(FORM, PARTS, "method", panel)
                self.all_methods = gr.Checkbox(
                    label="All methods",
                    scale=1,
                    elem_id=f"{panel}-all_methods",
                    tooltip="Otherwise the list has those for the chosen checkpoint only.",
                )
            with gr.Row():
                self.status = gr.HTML(elem_id=f"{panel}-status")
                self.download = gr.Button(
                    "Download weights",
                    visible=False,
                    size="sm",
                    elem_id=f"{panel}-download",
                    tooltip="Fetch the weights now, rather than with the first picture.",
                )
                self.cancel = gr.Button(
                    "Cancel download",
                    visible=False,
                    size="sm",
                    elem_id=f"{panel}-cancel",
                    tooltip="What has come is kept, and the next download goes on from there.",
                )
            for row in ROWS:
                with gr.Row():
                    self.parts |= {name: part(FORM, PARTS, name, panel) for name in row}
            gr.HTML(f"<small>{TITLE} {own_version()}</small>", elem_id=f"{panel}-version")
            show_what_is_used(self.parts, "method", lambda label: visible(find_method(label)))

    @property
    def components(self) -> list[Any]:
        """In the order of Controls; the accordion itself is the tick."""
        return [self.parts[name] for name in FORM.names]

    @property
    def _forecast(self) -> list[Any]:
        return [self.status, self.download, self.cancel]

    def connect(self, batch_size: Any, gallery: Any) -> None:
        """To the other components of the tab; inside the row of buttons under its gallery."""
        method = self.parts["method"]
        show = {"inputs": [method, batch_size], "outputs": self._forecast}
        refit = {"inputs": [self.all_methods, method], "outputs": [method]}
        for changed in (method.change, batch_size.change):
            changed(self._show, **show, **QUICK)
        self.all_methods.change(self._refit, **refit, **QUICK)
        Context.root_block.load(self._refit, **refit, **QUICK).then(self._show, **show, **QUICK)
        followed = self.download.click(
            self._download,
            **show,
            show_progress=False,
            **AT_ONCE,  # pressed right after Cancel, the one before may still be about to end
        )
        method.change(None, cancels=[followed])  # the download itself goes on
        self.cancel.click(self._cancel, **show, **QUICK)
        for layer in Layer:
            self._send_button(layer, gallery)

    def look_after_jobs(self, result: Any, batch_size: Any) -> None:
        """result: what changes when a job has ended; it may have brought the weights."""
        result.change(self._show, inputs=[self.parts["method"], batch_size], outputs=self._forecast, **QUICK)

    def follow(self, checkpoint: Any, batch_size: Any) -> None:
        """The page's choice of a checkpoint."""
        method = self.parts["method"]
        refit = {"inputs": [self.all_methods, method, checkpoint], "outputs": [method]}
        show = {"inputs": [method, batch_size, checkpoint], "outputs": self._forecast}
        checkpoint.change(self._refit, **refit, **QUICK).then(self._show, **show, **QUICK)

    def _refit(self, all_methods: bool, label: str, checkpoint: str | None = None) -> Any:
        """The list of methods for the checkpoint, and one of them that does what the chosen one does."""
        return fitting(find_method(label), None if all_methods else self.extension.chosen_family(checkpoint))

    def _show(self, label: str, batch_size: float, checkpoint: str | None = None) -> list[Any]:
        method = find_method(label)
        weights = self._weights(method)
        family = self.extension.chosen_family(checkpoint)
        downloading = any(status.state is State.DOWNLOADING for status in weights)
        absent = any(status.state is not State.PRESENT for status in weights)
        return [
            titled(as_html(forecast(method, int(batch_size), weights, family)), method),
            gr.update(visible=absent and not downloading),
            gr.update(visible=downloading),
        ]

    def _weights(self, method: Method) -> list[Status]:
        files = needed_files(method, encodes=self.tab == "img2img")
        return [self.extension.downloads.status(file) for file in files]

    def _download(self, label: str, batch_size: float) -> Iterator[list[Any]]:
        """Start what is missing, and show it until it ended, one way or the other."""
        for status in self._weights(find_method(label)):
            self.extension.downloads.start(status.asset.file)
        while any(status.state is State.DOWNLOADING for status in self._weights(find_method(label))):
            yield self._show(label, batch_size)
            time.sleep(LOOK_S)
        yield self._show(label, batch_size)

    def _cancel(self, label: str, batch_size: float) -> list[Any]:
        for status in self._weights(find_method(label)):
            self.extension.downloads.cancel(status.asset.file)
        return self._show(label, batch_size)

    def _send_button(self, layer: Layer, gallery: Any) -> None:
        symbol, tooltip = SEND[layer]
        button = ToolButton(symbol, elem_id=f"{self.tab}_send_to_layerdiffuse_{layer.value}", tooltip=tooltip)
        method = self.parts["method"]
        button.click(
            partial(self._send, layer),
            _js="(gallery, label) => [extract_image_from_gallery(gallery)[0], label]",
            inputs=[gallery, method],
            outputs=[self.parts["enabled"], method, self.parts[f"{layer.value}_image"]],
            show_progress=False,
        )

    def _send(self, layer: Layer, selected: Sequence[tuple[Any, Any]] | None, label: str) -> list[Any]:
        """Put the selected picture into a box, and choose a method that takes it."""
        if not selected:
            return [gr.update()] * 3
        method = find_method(label)
        taker = method if layer in method.inputs else taking(layer, method.family)
        choice = gr.update() if taker is method else fitting(taker, taker.family)
        return [True, choice, gr.update(value=selected[0][0], visible=True)]


class Page:
    """Connects the panels with what the web UI puts around them, as it builds its page."""

    def __init__(self, extension: Extension) -> None:
        self.extension = extension
        self.panels: dict[str, Panel] = {}
        self.found: dict[str, Any] = {}

    def panel(self, tab: str) -> list[Any]:
        """tab: txt2img or img2img. The API builds panels of its own, to read their defaults."""
        self.panels[tab] = Panel(tab, self.extension)
        return self.panels[tab].components

    def after_component(self, component: Any) -> None:
        """For each component that the web UI has made."""
        if Context.root_block is None:  # Gradio makes another one for each update, when the page has long been built
            return
        elem_id = component.elem_id
        if self.extension.host.is_checkpoint_box(component):
            for tab, panel in self.panels.items():
                panel.follow(component, self.found[f"{tab}_batch_size"])
        for tab in TABS:
            if elem_id in (f"{tab}_batch_size", f"{tab}_gallery"):
                self.found[elem_id] = component
            if elem_id == RESULT.format(tab=tab):
                self.panels[tab].look_after_jobs(component, self.found[f"{tab}_batch_size"])
            if elem_id == f"{tab}_send_to_extras":
                self.panels[tab].connect(self.found[f"{tab}_batch_size"], self.found[f"{tab}_gallery"])


def fitting(method: Method, family: Family | None) -> Any:
    """The list of methods for a family (None: all of them), with what comes nearest to `method` chosen."""
    return gr.update(choices=choices(family), value=value_of(counterpart(method, methods_of(family))))


def choices(family: Family | None) -> Sequence[Any]:
    """What the list of methods says, and what stands for it."""
    return worded_choices(
        [(worded(each.title if family else each.full_title), value_of(each)) for each in methods_of(family)]
    )


def worded(words: str) -> str:
    """In the page's language. The web UI translates what stands in a list, but not what is chosen from it."""
    translation = LOCALIZATIONS / f"{shared.opts.localization}.json"
    return json.loads(translation.read_text(encoding="utf-8"))[words] if translation.is_file() else words


def titled(html: str, method: Method) -> str:
    """With what infotexts and API calls call the method, for who points at it."""
    return f'<div title="{FORM.infotext("method")}: {escape(method.label)} ({method.key})">{html}</div>'


def as_html(sentences: Iterator[Sentence]) -> str:
    """Each piece an element of its own, as the page's translation needs it."""
    lines = (" ".join(f"<span>{escape(piece)}</span>" for piece in sentence) for sentence in sentences)
    return " &nbsp;|&nbsp; ".join(lines)


def change_panel() -> list[Any]:
    """Differential Diffusion's components, in the order of its controls."""
    with InputAccordion(False, label=differential.TITLE, elem_id="differential-img2img") as enabled:
        gr.Markdown("A denoising strength for every pixel: white is the strength set above, black stays as it is.")
        parts = {name: part(differential.FORM, CHANGE_PARTS, name, "differential-img2img") for name in CHANGE_PARTS}
        parts["enabled"] = enabled
        show_what_is_used(parts, "source", differential.uses)
    return [parts[name] for name in differential.FORM.names]


def show_what_is_used(parts: Mapping[str, Any], chooser: str, used: Callable[[str], Mapping[str, bool]]) -> None:
    """Hide the parts that the choice has no use for; what is left in them is not used."""
    boxes = used(parts[chooser].value)
    for name, shown in boxes.items():
        parts[name].visible = shown
    parts[chooser].change(
        lambda choice: [gr.update(visible=shown) for shown in used(choice).values()],
        inputs=[parts[chooser]],
        outputs=[parts[name] for name in boxes],
        **QUICK,
    )


def visible(method: Method) -> dict[str, bool]:
    """Of each part that not all methods need: whether this one does."""
    images = {f"{layer.value}_image": layer in method.inputs for layer in Layer}
    prompts = {f"{layer.value}_prompt": layer in method.outputs for layer in Layer}
    decoded = dict.fromkeys(("passes", "grey_background"), method.makes_foreground)
    return {**images, **prompts, **decoded, "resize_mode": bool(method.inputs)}


def paste_fields(form: Form, components: Sequence[Any]) -> list[tuple[Any, Callable[[Mapping[str, Any]], Any]]]:
    """How the web UI puts a picture's parameters back into the panel's components."""
    return [(component, partial(pasted, form, name)) for name, component in zip(form.names, components, strict=True)]


def pasted(form: Form, name: str, parameters: Mapping[str, Any]) -> Any:
    """A pasted method may be for another checkpoint than the chosen one: the list has all of them then."""
    value = form.pasted(name, parameters)
    if name != "method" or form is not FORM or value is None:
        return value
    # Of this kind, which both gradio and the host's API (modules/api/api.py:405) take for an update.
    return {**fitting(find_method(value), None), "__type__": "generic_update"}


def notice(tab: str, text: str) -> list[Any]:
    """The panel of a web UI that we cannot run in: why, and whether it is ticked nevertheless."""
    with InputAccordion(False, label=TITLE, elem_id=f"layerdiffuse-{tab}") as enabled:
        gr.Markdown(text)
    return [enabled]


def add_settings() -> None:
    """The extension's section of the settings page."""
    section = ("layerdiffuse", TITLE)
    shared.opts.add_option(
        "layerdiffuse_passes",
        shared.OptionInfo(8, FORM.label("passes"), gr.Radio, {"choices": list(PASSES)}, section=section).info(
            "fewer are faster; 8 give the cleanest edges"
        ),
    )
    shared.opts.add_option(
        "layerdiffuse_extras",
        shared.OptionInfo(
            ["opaque"],
            "Beside each transparent picture, show and save",
            gr.CheckboxGroup,
            {"choices": worded_choices([(extra.label, name) for name, extra in EXTRAS.items()])},
            section=section,
        ),
    )
