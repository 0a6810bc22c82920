"""The web UI that this process is, and whether it has what we use of it: looked for by name, never by version."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from operator import attrgetter

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.webui.host import Host

# What would fail in the middle of a job, or at the start with the whole extension. What some hosts have and others do
# not is looked for where it is used.
NEEDED: Mapping[str, str] = {
    "modules.call_queue": "queue_lock._lock",
    "modules.images": "draw_grid_annotations flatten save_image save_image_with_geninfo",
    "modules.img2img": "img2img_function",
    "modules.processing": "Processed.js apply_overlay create_random_tensors process_images",
    "modules.scripts": "ScriptRunner.run scripts_data postprocessing_scripts_data",
    "modules.sd_models": "get_closet_checkpoint_match",
    "modules.sd_samplers_common": "setup_img2img_steps",
    "modules.shared": "cmd_opts opts state",
    "modules.txt2img": "txt2img_function txt2img_upscale_function",
    "modules.ui_components": "InputAccordion ToolButton",
}


def web_ui() -> Host:
    """Raises LayerDiffuseError, saying what is missing, where it is none that we know, or too old or new."""
    try:
        if absent := list(missing()):
            raise LayerDiffuseError(f"it has no {' or '.join(absent)}")
        from lib_layerdiffuse.webui.a1111 import WebUI

        return WebUI()
    except (ImportError, LayerDiffuseError) as error:
        raise LayerDiffuseError(
            f"LayerDiffuse does not know this web UI, or this version of it ({error}). It runs in Forge, Forge Neo, "
            "reForge, Forge Classic and ersatzForge. An update of the extension may help."
        ) from error


def missing() -> Iterator[str]:
    for module, names in NEEDED.items():
        found = import_module(module)
        for name in names.split():
            try:
                attrgetter(name)(found)
            except AttributeError:
                yield f"{module}.{name}"
