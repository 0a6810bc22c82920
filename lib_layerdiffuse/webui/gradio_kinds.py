"""Gradio 4, and 3.41 as reForge and Classic have it, where one does not take what the other does."""

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any

import gradio as gr

IS_NEWER = "sources" in signature(gr.Image.__init__).parameters

# PNG: a picture sent to the box would otherwise come back from a WebP with loss. Gradio 3 has none but PNG.
IMAGE: Mapping[str, Any] = {"format": "png", "sources": ["upload", "clipboard"]} if IS_NEWER else {"source": "upload"}

# Of an event that all pages may have at once, pressed again before the first has ended; in Gradio 3 the queue is one.
AT_ONCE: Mapping[str, Any] = {"trigger_mode": "multiple", "concurrency_limit": None} if IS_NEWER else {}

# The component of a tab that changes with each job's end. Gradio 3's gallery has no such event, and what is hidden is
# not on the page in Gradio 4.
RESULT = "{tab}_gallery" if IS_NEWER else "generation_info_{tab}"


def worded_choices(pairs: Sequence[tuple[str, str]]) -> Sequence[Any]:
    """What a list says and what stands for it, each; Gradio 3 says what stands for it."""
    return pairs if IS_NEWER else [value for _, value in pairs]
