"""Pictures: colour under transparency, files read whatever they hold."""

from lib_layerdiffuse.images.rgba import pad_colors

__all__ = ["pad_colors"]
