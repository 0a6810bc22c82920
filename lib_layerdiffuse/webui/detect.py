"""The web UI that this process is."""

from __future__ import annotations

from importlib.util import find_spec

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.webui.host import Host

# What Forge alone has both of. Of Neo, reForge, Classic and ersatz the patchers are tested, the web UIs are not yet.
TRIED = ("backend", "modules.stealth_infotext")


def web_ui() -> Host:
    """Raises LayerDiffuseError, saying why, where it is none that we know."""
    try:
        if missing := [name for name in TRIED if not find_spec(name)]:
            raise LayerDiffuseError(f"it has no {' or '.join(missing)}")
        from lib_layerdiffuse.webui.a1111 import WebUI

        return WebUI()
    except (ImportError, LayerDiffuseError) as error:
        raise LayerDiffuseError(
            f"LayerDiffuse does not know this web UI ({error}). It runs in Stable Diffusion WebUI Forge 2.x."
        ) from error
