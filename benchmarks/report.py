"""Put the figures of results/*.json into RESULTS.md, between its marks, and draw those of decoding.

python -m benchmarks.report
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Drawing

from benchmarks.figures import Figure, remarks

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
AXES = {"s": "seconds of one pass", "MiB": "peak memory of one pass, MiB"}


def table(figures: Sequence[Figure]) -> str:
    """A row for all figures of a name. Details stay in the JSON file."""
    rows = ["| what | medians | |", "|---|---|---|"]
    shown = [each for each in figures if not each.get("detail")]
    for name in dict.fromkeys(each["name"] for each in shown):
        own = [each for each in shown if each["name"] == name]
        sides = {
            side: ", ".join(f"{digits(each['sides'][side]['median'])} {each['unit']}" for each in own)
            for side in own[0]["sides"]
        }
        medians = "<br>".join(f"{side} {values}" for side, values in sides.items())
        rows.append(f"| {name} | {medians} | {'<br>'.join(remark for each in own for remark in remarks(each))} |")
    return "\n".join(rows)


def digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(each)}" for key, each in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def about(machine: dict[str, Any]) -> str:
    return "; ".join(f"{key}: {shown(value)}" for key, value in machine.items() if value is not None)


def plot(figures: Sequence[Figure], path: Path) -> None:
    """Time and memory of one pass over one picture, by its pixels."""
    drawing = Drawing(figsize=(10, 4), layout="constrained")
    for pane, (unit, label) in zip(drawing.subplots(1, 2), AXES.items()):
        of_unit = [each for each in figures if each["unit"] == unit and each["case"][1:] == [1, 1]]
        for side in of_unit[0]["sides"]:
            points = [(each["case"][0] ** 2 / 1e6, each["sides"][side]["median"]) for each in of_unit]
            pane.plot(*zip(*sorted(points)), marker="o", label=side)
        pane.set(xlabel="megapixels", ylabel=label, ylim=(0, None))
        pane.grid(alpha=0.3)
        pane.legend()
    drawing.savefig(path, dpi=110)


def report() -> None:
    text = RESULTS.read_text(encoding="utf-8")
    for path in sorted((HERE / "results").glob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        if path.stem == "decode":
            plot(found["figures"], HERE / "decode.png")
        begin, end = f"<!-- {path.stem} -->", f"<!-- end of {path.stem} -->"
        inner = f"{begin}\n{table(found['figures'])}\n\n{about(found['machine'])}.\n{end}"
        text = re.sub(f"{begin}.*?{end}", lambda _, inner=inner: inner, text, flags=re.DOTALL)
    RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    report()
