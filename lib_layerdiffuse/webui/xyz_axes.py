"""What an X/Y/Z plot can vary of a job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from modules import scripts

from lib_layerdiffuse.methods import METHODS
from lib_layerdiffuse.request.layers import FORM
from lib_layerdiffuse.webui.job import Job

PREFIX = "[LayerDiffuse]"

# A control, the type of its values, and what they are chosen from.
AXES: Sequence[tuple[str, type, Callable[[], list[str]] | None]] = (
    ("method", str, lambda: [method.full_title for method in METHODS]),
    ("weight", float, None),
    ("starting_step", float, None),
    ("ending_step", float, None),
    ("passes", int, None),
)


def add() -> None:
    """Put them at the end of the plot's list, unless they are there: Reload UI calls this again."""
    for data in scripts.scripts_data:
        plot = data.module
        if Path(data.path).name != "xyz_grid.py" or any(
            option.label.startswith(PREFIX) for option in plot.axis_options
        ):
            continue
        for name, kind, choices in AXES:
            plot.axis_options.append(
                plot.AxisOption(f"{PREFIX} {FORM.label(name)}", kind, change(name), choices=choices)
            )


def change(name: str) -> Callable[[Any, Any, Any], None]:
    """What a plot does to the job of one of its cells, a copy of its own job."""

    def apply(p: Job, value: Any, values: Any) -> None:
        p.layerdiffuse_axes = {**getattr(p, "layerdiffuse_axes", {}), name: value}

    return apply
