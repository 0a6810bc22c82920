"""Figures as the benchmarks write them, and as RESULTS.md shows them. Standard library only.

A figure: {"name", "unit", "sides": {side: {"median", "low", "high", "n"}}, "ratios": {"a / b": of the medians},
"demand": {"a / b": the most that it should be}}, low and high being quartiles; "limit" and "error" where known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

Figure = dict[str, Any]


def summary(samples: Sequence[float]) -> dict[str, float]:
    low, middle, high = quantiles(samples, method="inclusive") if len(samples) > 1 else 3 * list(samples)
    return {"median": middle, "low": low, "high": high, "n": len(samples)}


def figure(
    name: str,
    unit: str,
    samples: Mapping[str, Sequence[float]],
    *ratios: str,
    demand: Mapping[str, float] | None = None,
    **more: Any,
) -> Figure:
    """ratios: "a / b", of those sides that there are. Prints the figure in a line."""
    sides = {side: summary(values) for side, values in samples.items() if values}
    pairs = {ratio: ratio.split(" / ") for ratio in ratios}
    found = {
        ratio: sides[a]["median"] / sides[b]["median"] for ratio, (a, b) in pairs.items() if {a, b} <= sides.keys()
    }
    entry = {"name": name, "unit": unit, "sides": sides, "ratios": found, "demand": dict(demand or {}), **more}
    print(in_a_line(entry), flush=True)
    return entry


def in_a_line(entry: Figure) -> str:
    sides = ", ".join(f"{side} {spread(found)}" for side, found in entry["sides"].items())
    return "; ".join([f"{entry['name']}: {sides} {entry['unit']}", *remarks(entry)])


def spread(found: Mapping[str, float]) -> str:
    single = found["n"] == 1
    return f"{found['median']:.4g}" if single else f"{found['median']:.4g} ({found['low']:.4g}–{found['high']:.4g})"


def remarks(entry: Figure) -> list[str]:
    """Ratios with what is demanded of them, how near the limit, how exact."""
    demands = {key: f" (demand {value:.3g})" for key, value in entry["demand"].items()}
    ratios = [f"{key} = {value:.3g}{demands.get(key, '')}" for key, value in entry["ratios"].items()]
    limits = [
        f"{side} at {limit / entry['sides'][side]['median']:.0%} of the limit ({limit:.3g} {entry['unit']})"
        for side, limit in entry.get("limit", {}).items()
    ]
    errors = [
        f"{side} differs by at most {error['float']:.1e}, {error['of 255']:.0f} of 255"
        for side, error in entry.get("error", {}).items()
    ]
    return ratios + limits + errors


def write(path: Path, machine: Mapping[str, Any], figures: Sequence[Figure]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": dict(machine), "figures": list(figures)}, indent=1) + "\n", encoding="utf-8")
