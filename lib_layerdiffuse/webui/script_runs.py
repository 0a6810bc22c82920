"""Jobs that one of the web UI's scripts runs, and what becomes of their pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lib_layerdiffuse.images.rgba import alpha_range
from lib_layerdiffuse.webui.outputs import is_marked

ENLARGE = "Img2img and Hires. fix enlarge with transparency."
ADD = "To add something beside a cut-out, give it a larger transparent canvas and use Inpaint."

# Scripts that paint their picture piece by piece on an opaque canvas, by their titles in small letters; and what keeps
# transparency instead.
OPAQUE: Mapping[str, str] = {
    "sd upscale": ENLARGE,
    "ultimate sd upscale": ENLARGE,
    "outpainting mk2": ADD,
    "poor man's outpainting": ADD,
}


# Web UIs write a stealth infotext into the lowest bit of an alpha of 255.
STEALTH_ALPHA = 254


@dataclass
class ScriptRun:
    """One run of a script: its jobs have it in common."""

    title: str
    foregrounds: int = 0  # made by its jobs
    refusals: dict[str, None] = field(default_factory=dict)  # the sentences, which scripts may swallow

    @property
    def is_opaque(self) -> bool:
        """Whether the script can do nothing with transparency: it gets opaque pictures then."""
        return self.title.lower() in OPAQUE

    def notes(self, images: Sequence[Any]) -> Iterator[str]:
        """What a person should know of what the script made of its jobs' pictures."""
        yield from self.refusals
        flat = [image for image in images if not is_marked(image) and alpha_range(image)[0] >= STEALTH_ALPHA]
        if self.foregrounds and flat:
            which = f"{len(flat)} of its pictures have none" if len(flat) < len(images) else "its pictures have none"
            yield f"{self.title} puts pictures together without transparency: {which}. {self._advice}"

    @property
    def _advice(self) -> str:
        return OPAQUE.get(self.title.lower(), "The single pictures have it.")
