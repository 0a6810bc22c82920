"""Web UIs that the extension runs in, one file each; everything else knows them through `base.Host`."""

from __future__ import annotations

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.webui.host import Host


def web_ui() -> Host:
    """The host that this process is. Raises LayerDiffuseError, saying why, where it is none that we know."""
    try:
        from lib_layerdiffuse.webui.a1111 import WebUI

        return WebUI()
    except (ImportError, LayerDiffuseError) as error:
        raise LayerDiffuseError(
            f"LayerDiffuse does not know this web UI ({error}). It runs in Stable Diffusion WebUI Forge, Forge Neo, "
            "reForge, Forge Classic and ersatzForge."
        ) from error
