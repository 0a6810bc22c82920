"""Stable Diffusion WebUI Forge 2: lllyasviel/stable-diffusion-webui-forge.

File and line in comments are of commit dfdcbab6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from modules import shared, stealth_infotext
from modules_forge import forge_version

from lib_layerdiffuse.engine import programs
from lib_layerdiffuse.engine.hosted import HostedModel
from lib_layerdiffuse.webui.a1111 import WebUI
from lib_layerdiffuse.webui.changes import divert


class Forge(WebUI):
    """See `host.Host`."""

    def __init__(self) -> None:
        self.backend = HostedModel(programs.running(), lambda: shared.sd_model)

    def name(self) -> str:
        return f"Stable Diffusion WebUI Forge {forge_version.version}"

    def is_checkpoint_box(self, component: Any) -> bool:
        # It has no elem_id (modules_forge/main_entry.py:74).
        return getattr(component, "label", "") == "Checkpoint" and "model_selection" in (component.elem_classes or ())

    def keep_pixels(self, condition: Callable[[Any], bool]) -> None:
        """Keep the stealth infotext, which writes over alpha or fails on other modes than RGB, off some images.

        condition: of the host's ImageSaveParams.
        """
        divert(stealth_infotext, "add_stealth_pnginfo", condition, lambda params: None)
