"""Put the figures of results/*.json into RESULTS.md, between its marks, and draw the plots.

python -m benchmarks.report
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Drawing

from benchmarks.figures import Figure, remarks, spread

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
AXES = {"s": "seconds of one pass", "MiB": "peak memory of one pass, MiB"}


def table(figures: Sequence[Figure]) -> str:
    rows = ["| what | unit | median (quartiles) | |", "|---|---|---|---|"]
    for each in figures:
        sides = "<br>".join(f"{side}: {spread(found)}, n {found['n']}" for side, found in each["sides"].items())
        rows.append(f"| {each['name']} | {each['unit']} | {sides} | {'<br>'.join(remarks(each))} |")
    return "\n".join(rows)


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(each)}" for key, each in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def about(machine: dict[str, Any]) -> str:
    return "\n".join(f"- {key}: {shown(value)}" for key, value in machine.items())


def plot(figures: Sequence[Figure], path: Path, of_batch: bool) -> None:
    """Time and memory over pixels of one picture, or over the batch at one size."""
    chosen = [
        each for each in figures if (each["scale"]["size"] == [512, 512] if of_batch else each["scale"]["batch"] == 1)
    ]
    drawing = Drawing(figsize=(10, 4), layout="constrained")
    for pane, (unit, label) in zip(drawing.subplots(1, 2), AXES.items()):
        of_unit = [each for each in chosen if each["unit"] == unit]
        for side in dict.fromkeys(side for each in of_unit for side in each["sides"]):
            points = [
                (
                    each["scale"]["batch"] if of_batch else each["scale"]["size"][0] * each["scale"]["size"][1] / 1e6,
                    each["sides"][side]["median"],
                )
                for each in of_unit
                if side in each["sides"]
            ]
            pane.plot(*zip(*sorted(points)), marker="o", label=side)
        pane.set(xlabel="pictures of 512×512" if of_batch else "megapixels", ylabel=label, ylim=(0, None))
        pane.grid(alpha=0.3)
        pane.legend()
    drawing.savefig(path, dpi=110)


def report() -> None:
    text = RESULTS.read_text(encoding="utf-8")
    for path in sorted((HERE / "results").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        scale = [each for each in found["figures"] if "scale" in each]
        others = [each for each in found["figures"] if "scale" not in each]
        if scale:
            plot(scale, HERE / "pixels.png", of_batch=False)
            plot(scale, HERE / "batch.png", of_batch=True)
        inner = f"{about(found['machine'])}\n\n{table(others + scale)}"
        begin, end = f"<!-- {path.stem} -->", f"<!-- end of {path.stem} -->"
        if begin not in text:
            text += f"\n{begin}\n{end}\n"
        text = re.sub(
            f"{begin}.*?{end}",
            lambda _, inner=inner, begin=begin, end=end: f"{begin}\n{inner}\n{end}",
            text,
            flags=re.DOTALL,
        )
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    report()
