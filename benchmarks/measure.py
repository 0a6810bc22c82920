"""What a benchmark in this process shares: runs side by side, peak memory, and what the machine can do at best."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    synchronise()
    start = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - start


def interleaved(sides: Mapping[str, Callable[[], object]], rounds: int, warm_up: bool = True) -> dict[str, list[float]]:
    """Seconds of each side: A B C, A B C, … after one round that does not count."""
    samples: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(-warm_up, rounds):
        for side, work in sides.items():
            taken = seconds(work)
            if turn >= 0:
                samples[side].append(taken)
    return samples


def memory(field: str) -> int:
    """Bytes from /proc/self/status: VmRSS, or its peak, VmHWM."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


def peak_memory(work: Callable[[], object]) -> int:
    """Bytes that `work` took beyond what was in use before: of the GPU where it runs there, else of the process."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak begins anew (man 5 proc)
    before = memory("VmRSS")
    work()
    return memory("VmHWM") - before


def processor() -> str:
    names = [
        line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if line.startswith("model name")
    ]
    return names[0].split(":")[1].strip() if names else platform.processor()


def rate(dtype: torch.dtype, device: torch.device, side: int = 4096, rounds: int = 5) -> float:
    """Operations per second of a matrix product, the best of some."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(interleaved({"product": lambda: a @ b}, rounds)["product"])


def score_rate(dtype: torch.dtype, inner: int, heads: int = 4, tokens: int = 4096, queries: int = 128) -> float:
    """Scores of attention per second on a processor, the best of some: both products, thin as heads are, and 2^x.

    So few queries at once that the scores stay in a cache.
    """
    some, scores = torch.randn(heads, inner, queries).to(dtype), torch.empty(heads, tokens, queries).to(dtype)
    keys, values = torch.randn(heads, tokens, inner).to(dtype), torch.randn(heads, inner, tokens).to(dtype)
    parts = {
        "scores": lambda: torch.bmm(keys, some, out=scores),
        "weights": lambda: scores.exp2_(),
        "answers": lambda: torch.bmm(values, scores),
    }
    return scores.numel() / sum(min(taken) for taken in interleaved(parts, 20).values())


def activation_rate(dtype: torch.dtype, numbers: int = 2**20) -> float:
    """Numbers per second that a processor activates (SiLU) in a cache, the best of some."""
    x = torch.randn(numbers).to(dtype)
    y = torch.empty_like(x)
    return numbers / min(interleaved({"silu": lambda: torch.ops.aten.silu.out(x, out=y)}, 20)["silu"])


def bandwidth(device: torch.device, numbers: int = 2**27, rounds: int = 5) -> float:
    """Bytes per second of a copy, read and written, the best of some."""
    source = torch.zeros(numbers, device=device)
    target = torch.zeros_like(source)
    return 2 * 4 * numbers / min(interleaved({"copy": lambda: target.copy_(source)}, rounds)["copy"])


def machine(device: torch.device, dtypes: Collection[torch.dtype], head_dim: int) -> dict[str, Any]:
    """What it is, and its rates in each precision; of a processor also those beside plain products."""
    rates: dict[str, Callable[[torch.dtype], float]] = {"operations": lambda dtype: rate(dtype, device)}
    if device.type == "cpu":
        rates |= {"scores": lambda dtype: score_rate(dtype, head_dim), "activations": activation_rate}
    return {
        "processor": f"{processor()} ({torch.backends.cpu.get_cpu_capability()}), {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "bytes per second": bandwidth(device),
        **{
            f"{what} per second": {str(dtype).removeprefix("torch."): found(dtype) for dtype in dtypes}
            for what, found in rates.items()
        },
    }
