"""Decoding measured: ours beside a plain reference (diffusers' blocks, one pass after another, `torch.median`).

    python -m benchmarks.decode [--full] [--out benchmarks/results/decode.json]

Both have the same random weights at the released sizes and the same input; how beautiful the answer is, they cannot
tell. On a GPU, where there is one, in half precision too, compiled and with CUDA graphs. Memory is measured in a fresh
process each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import measure
from benchmarks.figures import Figure, figure, write
from lib_layerdiffuse.nets.decoder import HEAD_DIM, TransparentDecoder
from lib_layerdiffuse.vae import ORIENTATIONS, TransparentVAE
from tests.reference import RELEASED_WIDTHS, ReferenceDecoder, random_state_dict

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
REFERENCE, OURS = "reference", "ours"


class Side(NamedTuple):
    """A way of ours. mode: of torch.compile; none: as it is."""

    dtype: torch.dtype = torch.float32
    mode: str | None = None


# On a processor everything is computed in float32.
HALF_SIDES = {
    "ours in half precision": Side(torch.float16),
    "the same compiled": Side(torch.float16, "default"),
    "the same with CUDA graphs": Side(torch.float16, "reduce-overhead"),
}
SIDES: Mapping[str, Side] = {OURS: Side()} | (HALF_SIDES if DEVICE.type == "cuda" else {})


class Case(NamedTuple):
    """What is decoded: a square, how many of it, in how many passes."""

    side: int
    batch: int = 1
    passes: int = 1

    def __str__(self) -> str:
        several = [f"{self.batch} pictures"] * (self.batch > 1) + [f"{self.passes} passes"] * (self.passes > 1)
        return ", ".join([f"{self.side}×{self.side}", *several])


QUICK = [Case(side) for side in (256, 512, 1024)]
FULL = [*QUICK, Case(1536), Case(512, 4), Case(512, passes=8), Case(1024, passes=8)]
ON_GPU = [Case(side, batch, passes) for side in (512, 1024, 2048) for batch in (1, 4) for passes in (1, 8)]
# At most, of the reference's time: what is promised of a large picture.
LARGE, DEMAND = 1024, 1 / 2.2 if DEVICE.type == "cpu" else 1 / 4


def networks() -> tuple[nn.Module, dict[str, Tensor]]:
    """The reference, and its weights: answers spread over 0..1, most of them within."""
    reference = ReferenceDecoder(RELEASED_WIDTHS)
    state_dict = random_state_dict(reference)
    state_dict["conv_out.weight"] *= 0.5
    state_dict["conv_out.bias"] += 0.7
    reference.load_state_dict(state_dict)
    return reference.to(DEVICE).eval(), state_dict


def picture(width: int, height: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Smooth patches with edges and some grain, and a latent as smooth."""
    generator = torch.Generator().manual_seed(0)

    def smooth(channels: int, scale: int) -> Tensor:
        coarse = torch.randn(batch, channels, height // 64 + 1, width // 64 + 1, generator=generator)
        return nn.functional.interpolate(coarse, (height // scale, width // scale), mode="bicubic")

    grain = torch.rand(batch, 3, height, width, generator=generator)
    rgb = (smooth(3, 1).sigmoid() + 0.3 * (smooth(1, 1) > 0) + 0.05 * grain).clamp(0, 1)
    return rgb.to(DEVICE), smooth(4, 8).to(DEVICE)


@torch.no_grad()
def reference_decode(net: nn.Module, rgb: Tensor, latent: Tensor, passes: int) -> Tensor:
    """As the public tools decode: in each orientation a pass over the picture, then the median."""
    weight = next(net.parameters())
    rgb, latent = rgb.to(weight), latent.to(weight)
    answers = [turn.undo(net(turn.apply(rgb), turn.apply(latent))).clip(0, 1) for turn in ORIENTATIONS[:passes]]
    return torch.stack(answers).median(dim=0).values[:, [1, 2, 3, 0]].float()


def makers() -> dict[str, Callable[[], Callable[..., Tensor]]]:
    """What makes each side's `decode(rgb, latent, passes)`."""

    def ours(side: Side) -> Callable[..., Tensor]:
        weights = {key: weight.to(side.dtype) for key, weight in networks()[1].items()}
        decoder = TransparentDecoder.from_state_dict(weights).to(DEVICE)
        if side.mode:
            decoder.compile(mode=side.mode)
        return TransparentVAE(decoder).decode

    def reference() -> Callable[..., Tensor]:
        return partial(reference_decode, networks()[0])

    return {REFERENCE: reference} | {name: partial(ours, side) for name, side in SIDES.items()}


class Work(NamedTuple):
    """What a pass has to do."""

    operations: int  # of its products, without those of scores with queries, keys and values
    scores: int  # of attention
    activations: int  # numbers through SiLU
    numbers: int  # that its convolutions and products read and write, weights included

    @classmethod
    def counted(cls, width: int, height: int) -> Work:
        with torch.device("meta"):
            net = ReferenceDecoder(RELEASED_WIDTHS)
            rgb, latent = torch.empty(1, 3, height, width), torch.empty(1, 4, height // 8, width // 8)
        found: Counter[str] = Counter(numbers=sum(x.numel() for x in net.parameters()))
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_hook(lambda _, x, y: found.update(numbers=x[0].numel() + y.numel()))
            if isinstance(layer, nn.SiLU):
                layer.register_forward_hook(lambda _, x, y: found.update(activations=y.numel()))
            if isinstance(layer, Attention):
                layer.to_q.register_forward_hook(
                    lambda _, x, q: found.update(scores=q.numel() * q.shape[1] // HEAD_DIM)
                )
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(rgb, latent)
        return cls(operations=counter.get_total_flops() - 4 * HEAD_DIM * found["scores"], **found)

    def least_seconds(self, about: dict[str, Any], dtype: torch.dtype) -> float:
        """That nobody gets below: all of it at the best rates of this machine, or its bytes at that of a copy.

        On a GPU, scores count as operations, and activations as nothing.
        """
        rates = {
            what: max(of_each[precision] for precision in ("float32", str(dtype).removeprefix("torch.")))
            for what in ("operations", "scores", "activations")
            if (of_each := about.get(f"{what} per second"))
        }
        rates.setdefault("scores", rates["operations"] / (4 * HEAD_DIM))
        computing = sum(getattr(self, what) / per_second for what, per_second in rates.items())
        return max(computing, self.numbers * dtype.itemsize / about["bytes per second"])


def worst(a: Tensor, b: Tensor) -> dict[str, float]:
    in_bytes = [(x * 255).round() for x in (a, b)]
    return {"float": (a - b).abs().max().item(), "of 255": (in_bytes[0] - in_bytes[1]).abs().max().item()}


def keep(answers: dict[str, Tensor], side: str, decode: Callable[[], Tensor]) -> None:
    answers[side] = decode()


def speed(about: dict[str, Any], case: Case, decoders: Mapping[str, Callable[..., Tensor]]) -> Figure:
    rgb, latent = picture(case.side, case.side, case.batch)
    answers: dict[str, Tensor] = {}
    works = {
        side: partial(keep, answers, side, partial(decode, rgb, latent, case.passes))
        for side, decode in decoders.items()
    }
    samples = measure.interleaved(works, rounds=2 if case.passes > 1 else 3)
    work, times = Work.counted(case.side, case.side), case.batch * case.passes
    return figure(
        str(case),
        "s",
        samples,
        *(f"{side} / {REFERENCE}" for side in SIDES),
        demand={f"{side} / {REFERENCE}": DEMAND for side in SIDES} if case.side >= LARGE else {},
        limit={name: times * work.least_seconds(about, side.dtype) for name, side in SIDES.items()},
        error={side: worst(answers[side], answers[REFERENCE]) for side in SIDES},
        case=case,
    )


def memory(case: Case) -> Figure:
    """Beyond the weights, of one decode in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.decode", "--peak"]
    peaks = {
        side: subprocess.run([*command, json.dumps([side, case])], check=True, capture_output=True).stdout
        for side in makers()
    }
    return figure(str(case), "MiB", {side: [int(peak) / 2**20] for side, peak in peaks.items()}, case=case)


def peak(side: str, case: Case) -> int:
    decode = makers()[side]()
    decode(*picture(64, 64), 1)  # what is loaded at the first use is not the picture's
    return measure.peak_memory(partial(decode, *picture(case.side, case.side, case.batch), case.passes))


def figures(about: dict[str, Any], cases: list[Case]) -> Iterator[Figure]:
    decoders = {side: make() for side, make in makers().items()}
    for case in cases:
        yield speed(about, case, decoders)
        yield memory(case)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode.json"))
    parser.add_argument("--peak", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        side, case = arguments.peak
        print(peak(side, Case(*case)))
        return
    about = measure.machine(DEVICE, {side.dtype for side in SIDES.values()}, HEAD_DIM)
    found: list[Figure] = []
    for each in figures(about, ON_GPU if DEVICE.type == "cuda" else FULL if arguments.full else QUICK):
        found.append(each)
        write(arguments.out, about, found)


if __name__ == "__main__":
    main()
