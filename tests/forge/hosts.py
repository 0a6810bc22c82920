"""What web UIs lack of what these tests use, and why: the tests that need it are skipped there, with the reason."""

import os
from collections.abc import Mapping

import pytest

HOST = os.environ.get("HOST", "forge")
GRADIO_3 = ("reforge", "classic")
NO_OUTPAINTING = "it has no outpainting scripts"
LACKS: Mapping[str, Mapping[str, str]] = {
    "forge": {},
    "neo": {
        "any size": "this tree makes every size a multiple of 64 (modules/processing.py:976)",
        "latent upscalers": "it enlarges no latents",
        "outpainting": NO_OUTPAINTING,
        "combined image": "its script combines none",
        "HRFix": "it has no Kohya HRFix",
    },
    "reforge": {"combined image": "its script combines none"},
    "classic": {
        "combined image": "its script combines none",
        "outpainting": NO_OUTPAINTING,
        "HRFix": "it has no Kohya HRFix",
        "transparent extras": "its Extras tab makes every picture RGB",
        "transparent grids": "its grids are RGB",
    },
    "ersatz": {
        "HRFix": "it has no Kohya HRFix",
        "user LoRAs": "its lora_script.py does not load in this commit",
        "transparent extras": "its API fails for every picture in this commit",
        "pictures of interrupted jobs": "it shows their latents as they are",
    },
}


LATENT_UPSCALER = {"ersatz": "Latent (antialiased)"}.get(HOST, "Latent")


def needs(what: str) -> pytest.MarkDecorator:
    assert any(what in lacking for lacking in LACKS.values()), f"no host lacks {what}"
    reason = LACKS[HOST].get(what)
    return pytest.mark.skipif(reason is not None, reason=f"{HOST}: {reason}")
