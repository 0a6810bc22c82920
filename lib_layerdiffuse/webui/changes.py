"""How functions of a web UI are changed, for what it has no hook: once, however often it loads its scripts again.

A web UI of another version may have a function no longer. That costs what was changed there, and no more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

log = logging.getLogger("layerdiffuse")


def change(owner: Any, name: str, changed: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `changed(original)` in the place of `owner.name`."""
    original = getattr(owner, name, None)
    if original is None:
        log.warning("this web UI has no %s in %s: LayerDiffuse leaves it as it is there", name, owner)
    if original is None or hasattr(original, "changed_by_layerdiffuse"):
        return
    function = wraps(original)(changed(original))
    function.changed_by_layerdiffuse = True  # type: ignore[attr-defined]
    setattr(owner, name, function)


def divert(owner: Any, name: str, condition: Callable[[Any], bool], instead: Callable[[Any], Any]) -> None:
    """Have `owner.name(x)` call `instead(x)` where `condition(x)`; all else reaches the original as before."""
    change(owner, name, lambda original: lambda x: instead(x) if condition(x) else original(x))


def after(owner: Any, name: str, then: Callable[[Any], Any]) -> None:
    """Have `owner.name` answer with `then` of its answer."""
    change(owner, name, lambda original: lambda *args: then(original(*args)))
