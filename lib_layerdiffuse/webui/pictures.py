"""What Forge does with finished pictures, changed where it would lose their alpha or show their hidden colours.

File and line in comments are of commit dfdcbab6.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import copy
from inspect import getsource, signature
from itertools import zip_longest
from pathlib import Path
from typing import Any

from modules import images, img2img, processing, scripts, shared, txt2img
from PIL import Image

from lib_layerdiffuse.images.extras import EXTRAS
from lib_layerdiffuse.images.rgba import flattened
from lib_layerdiffuse.request.layers import FORM
from lib_layerdiffuse.webui.changes import after, change
from lib_layerdiffuse.webui.job import Job, Processed
from lib_layerdiffuse.webui.outputs import (
    LOSSLESS,
    Picture,
    caption_of,
    infotext_of,
    is_marked,
    opaque_of,
    picture_of,
    text_of_extra,
)
from lib_layerdiffuse.webui.script_runs import ScriptRun

Function = Callable[..., Any]


def module_of(file: str) -> Any:
    """The web UI's script of that file name, once it is loaded; None where there is none."""
    rows = (*scripts.scripts_data, *scripts.postprocessing_scripts_data)
    return next((row.module for row in rows if Path(row.path).name == file), None)


# --- scripts that put pictures together


def keep_alpha() -> None:
    """In files and in what scripts make of pictures."""
    change(images, "save_image_with_geninfo", opaque_in_lossy_files)
    change(images, "draw_grid_annotations", transparent_between_legends)
    change(scripts.ScriptRunner, "run", with_notes)
    if '"RGBA"' not in getsource(images.image_grid).replace("'", '"'):  # Classic's are opaque
        change(images, "image_grid", of_opaque_pictures)
    combining = module_of("prompts_from_file.py")
    if hasattr(combining, "image_grid"):  # of Forge and ersatz; others combine none
        change(combining, "image_grid", of_opaque_pictures)
    if upscaling := getattr(module_of("postprocessing_upscale.py"), "ScriptPostprocessingUpscale", None):
        change(upscaling, "upscale" if hasattr(upscaling, "upscale") else "_upscale", cropping_with_alpha)


def opaque_in_lossy_files(original: Function) -> Function:
    """The JPG that goes beside a large file of ours (`export_for_4chan`, images.py:751) shows the opaque picture.

    It is written right after the file itself, with the same infotext, and perhaps smaller.
    """
    latest: dict[Any, Picture] = {}  # by the infotext

    def save(image: Image.Image, geninfo: Any, filename: str, extension: Any = None, *args: Any, **more: Any) -> Any:
        suffix = (extension or Path(filename).suffix).lower()
        if suffix in LOSSLESS:
            latest.clear()
            if picture := picture_of(image):
                latest[geninfo] = picture
        elif image.mode == "RGBA" and geninfo in latest:
            image = latest[geninfo].opaque.resize(image.size, Image.Resampling.LANCZOS)
        elif image.mode == "RGBA" and FORM.infotext("method") in (geninfo or ""):
            image = flattened(image)
        return original(image, geninfo, filename, extension, *args, **more)

    return save


def transparent_between_legends(original: Function) -> Function:
    """The legend is drawn on an opaque canvas (images.py:191), on which our cells then take their places again."""

    def draw(grid: Image.Image, width: int, height: int, across: Any, down: Any, margin: int = 0) -> Image.Image:
        drawn = original(grid, width, height, across, down, margin)
        if grid.mode != "RGBA":
            return drawn
        drawn = drawn.convert("RGBA")
        columns, rows = grid.width // width, grid.height // height
        left = drawn.width - grid.width - margin * (columns - 1)
        top = drawn.height - grid.height - margin * (rows - 1)
        for row in range(rows):
            for column in range(columns):
                x, y = column * width, row * height
                cell = grid.crop((x, y, x + width, y + height))
                drawn.paste(cell, (left + x + column * margin, top + y + row * margin))
        return drawn

    return draw


def of_opaque_pictures(original: Function) -> Function:
    """A grid, where it becomes RGB, as a combined image does (prompts_from_file.py:184)."""
    return lambda pictures, *args, **more: original([opaque_of(each) for each in pictures], *args, **more)


def cropping_with_alpha(original: Function) -> Function:
    """Extras' "Crop to fit", for which Forge has an opaque canvas (postprocessing_upscale.py:106)."""
    parameters = signature(original)

    def upscale(*args: Any) -> Image.Image:
        asked = parameters.bind(*args)
        values = asked.arguments
        to_size = values["upscale_mode"] == 1
        if not (to_size and values["upscale_crop"] and values["image"].mode == "RGBA"):
            return original(*args)
        values["upscale_crop"] = False
        enlarged = original(*asked.args)
        width, height = values["upscale_to_width"], values["upscale_to_height"]
        values.get("info", {})["Postprocess crop to"] = f"{width}x{height}"  # not in ersatz
        left, upper = enlarged.width // 2 - width // 2, enlarged.height // 2 - height // 2
        return enlarged.crop((left, upper, left + width, upper + height))

    return upscale


def with_notes(original: Function) -> Function:
    """Scripts say what they made of our pictures, and what their jobs said."""

    def run(self: Any, p: Job, *args: Any) -> Any:
        script = self.selectable_scripts[args[0] - 1] if args and args[0] else None
        if script is None:
            return original(self, p, *args)
        p.layerdiffuse_script = script_run = ScriptRun(script.title())
        if script_run.is_opaque and is_on(self, args) and getattr(p, "init_images", None):
            p.init_images = [flattened(image) for image in p.init_images]
        processed = original(self, p, *args)
        if processed is not None and (script_run.foregrounds or script_run.refusals):
            for note in script_run.notes(processed.images):
                p.comment(note)
            tell(p, processed)
        return processed

    return run


def script_run_of(p: Job) -> ScriptRun:
    return getattr(p, "layerdiffuse_script", None) or ScriptRun("")


def is_on(runner: Any, args: Sequence[Any]) -> bool:
    """Whether LayerDiffuse is on in these args of all scripts."""
    own = (args[each.args_from : each.args_to] for each in runner.alwayson_scripts if each.title() == FORM.title)
    return any(FORM.is_on(each) for each in own)


def tell(p: Job, processed: Processed) -> None:
    """The job's notes: on the page, and where API clients see them."""
    processed.comments = "".join(f"{comment}\n" for comment in p.comments)
    if p.comments:
        notes = {"LayerDiffuse notes": list(p.comments)}
        processed.extra_generation_params = {**processed.extra_generation_params, **notes}


# --- the gallery


def show_pictures() -> None:
    """Have the gallery say what our pictures show, and all that use it find an infotext for each."""
    change(processing.Processed, "js", with_all_infotexts)
    for module, name in ((txt2img, "txt2img_function"), (img2img, "img2img_function")):
        after(module, name, lambda answer: (with_shown(answer[0], captioned(shown_in(answer[0]))), *answer[1:]))
    change(txt2img, "txt2img_upscale_function", with_own_extras)


def with_all_infotexts(original: Function) -> Function:
    """Save, Zip and "reuse seed" look one up for everything shown (ui_common.py:124, seed.py:90)."""

    def js(self: Any) -> Any:
        if any(map(is_marked, self.images)):
            self = copy(self)
            # Functions, of values that differ from picture to picture, Classic cannot write (processing.py:616).
            values = self.extra_generation_params.items()
            self.extra_generation_params = {key: None if callable(value) else value for key, value in values}
            own = zip_longest(self.infotexts[: len(self.images)], self.images)  # none where an X/Y/Z cell was refused
            texts = [*(text for text, _ in own), *map(infotext_of, self.extra_images)]
            self.infotexts = [text or self.info for text in texts]
        return original(self)

    return js


def with_extras(processed: Any) -> Any:
    """All that is shown, as what the job made."""
    ours = [image for image in processed.extra_images if is_marked(image)]
    processed.infotexts = [*processed.infotexts[: len(processed.images)], *map(infotext_of, ours)]
    processed.images = [*processed.images, *ours]
    processed.extra_images = [image for image in processed.extra_images if not is_marked(image)]
    return processed


def with_own_extras(original: Function) -> Function:
    """The upscale button (txt2img.py:67) puts a picture in another's place, and so come its extras."""

    def upscale(*args: Any) -> Any:
        answer, info, *rest = original(*args)
        shown = shown_in(answer)
        made = [picture for item in shown if (picture := picture_of(item))]
        if not made:
            return answer, info, *rest
        parameters = json.loads(info)
        given = signature(original).bind(*args).arguments
        before = json.loads(given["generation_info"])["infotexts"][given["gallery_index"]]
        keeps_both = getattr(shared.opts, "hires_button_gallery_insert", False)
        replaced = () if keeps_both else [text_of_extra(before, name) for name in EXTRAS]
        texts = parameters["infotexts"]  # not of what other extensions show behind the pictures
        rows = [row for row in zip_longest(shown, texts, fillvalue="") if row[1] not in replaced]
        new = next(text for item, text in rows if picture_of(item))
        for name, image in made[-1].extras.items():
            rows.append((captioned_as(image, EXTRAS[name].caption), text_of_extra(new, name)))
        parameters["infotexts"] = [text for _, text in rows]
        return with_shown(answer, [item for item, _ in rows]), json.dumps(parameters), *rest

    return upscale


def shown_in(answer: Any) -> Sequence[Any]:
    """The pictures in what is sent to a gallery: a list, or an update of one."""
    return (answer.get("value") or []) if isinstance(answer, dict) else answer


def with_shown(answer: Any, shown: Sequence[Any]) -> Any:
    """The same with other pictures."""
    return {**answer, "value": shown} if isinstance(answer, dict) and "value" in answer else shown


def captioned(shown: Sequence[Any]) -> list[Any]:
    """As galleries take them: an image, or an image and its caption."""
    return [captioned_as(image, caption_of(image)) for image in shown]


def captioned_as(image: Any, caption: str) -> Any:
    return (image, caption) if caption else image
