"""How functions of a web UI are changed, for what it has no hook: once, however often it loads its scripts again."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any


def change(owner: Any, name: str, changed: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `changed(original)` in the place of `owner.name`."""
    original = getattr(owner, name)
    if hasattr(original, "changed_by_layerdiffuse"):
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
