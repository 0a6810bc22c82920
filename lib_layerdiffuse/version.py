"""Which version this is."""

import re
from importlib.metadata import version
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def own_version() -> str:
    """From the checkout, which web UIs use as it is; without one, that of the installed wheel."""
    if not PROJECT.is_file():
        return version("sd-forge-layerdiffuse")
    [found] = re.findall(r'^version = "(.+)"$', PROJECT.read_text(encoding="utf-8"), re.MULTILINE)
    return found
