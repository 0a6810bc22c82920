"""Neo has Lanczos among its upscalers and lists it no longer; without a model to download there is no other."""

import os

from modules import script_callbacks, shared, upscaler


def add_lanczos():
    if not any(each.name == "Lanczos" for each in shared.sd_upscalers):
        shared.sd_upscalers += upscaler.UpscalerLanczos().scalers


if "LAYERDIFFUSE_PROBE" in os.environ:
    script_callbacks.on_before_ui(add_lanczos)
