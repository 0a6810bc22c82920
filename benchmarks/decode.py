"""Decoding measured: ours beside a plain reference (diffusers' blocks, one pass after another, `torch.median`).

    python -m benchmarks.decode [--full] [--out benchmarks/results/decode.json]

Both have the same random weights at the released sizes and the same input; how beautiful the answer is, they cannot
tell. Memory is measured in a fresh process each.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
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
from lib_layerdiffuse.vae import ORIENTATIONS, PASSES, TransparentVAE
from tests.reference import RELEASED_WIDTHS, ReferenceDecoder, random_state_dict

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.float16
Size = tuple[int, int]  # width, height
REFERENCE, OURS, OURS_HALF = "reference", "ours", f"ours {str(HALF).removeprefix('torch.')}"
# Half precision on a GPU: on a processor everything is computed in float32.
PRECISIONS = {OURS: torch.float32} | ({OURS_HALF: HALF} if DEVICE.type == "cuda" else {})
# At most, of the reference's time: 2.2 times as fast on a processor, 4 times on a GPU.
DEMANDS = {f"{OURS} / {REFERENCE}": 1 / 2.2 if DEVICE.type == "cpu" else 1 / 4, f"{OURS_HALF} / {REFERENCE}": 1 / 4}

QUICK = {(512, 512): PASSES, (1024, 1024): (1,)}
FULL = {(512, 512): PASSES, (768, 1152): PASSES, (1024, 1024): PASSES}
QUICK_SCALE: tuple[tuple[Size, int], ...] = tuple(((side, side), 1) for side in (256, 384, 512, 768))
FULL_SCALE = (*QUICK_SCALE, ((1024, 1024), 1), ((1536, 1536), 1), ((2048, 2048), 1), ((512, 512), 2), ((512, 512), 4))


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

    def ours(dtype: torch.dtype) -> Callable[..., Tensor]:
        _, state_dict = networks()
        decoder = TransparentDecoder.from_state_dict({key: x.to(dtype) for key, x in state_dict.items()}).to(DEVICE)
        return TransparentVAE(decoder).decode

    def reference() -> Callable[..., Tensor]:
        return partial(reference_decode, networks()[0])

    return {REFERENCE: reference} | {side: partial(ours, dtype) for side, dtype in PRECISIONS.items()}


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


def psnr(a: Tensor, b: Tensor) -> float:
    error = (a - b).square().mean().item()
    return 10 * math.log10(1 / error) if error else math.inf


def worst(a: Tensor, b: Tensor) -> dict[str, float]:
    in_bytes = [(x * 255).round() for x in (a, b)]
    return {"float": (a - b).abs().max().item(), "of 255": (in_bytes[0] - in_bytes[1]).abs().max().item()}


def keep(answers: dict[str, Tensor], side: str, decode: Callable[[], Tensor]) -> None:
    answers[side] = decode()


def speed(about: dict[str, Any], sizes: dict[Size, tuple[int, ...]]) -> Iterator[Figure]:
    decoders = {side: make() for side, make in makers().items()}
    for (width, height), counts in sizes.items():
        rgb, latent = picture(width, height)
        work = Work.counted(width, height)
        for passes in counts:
            answers: dict[str, Tensor] = {}
            works = {
                side: partial(keep, answers, side, partial(decode, rgb, latent, passes))
                for side, decode in decoders.items()
            }
            samples = measure.interleaved(works, rounds=3 if passes <= 2 else 2, warm_up=passes == 1)
            limits = {side: passes * work.least_seconds(about, dtype) for side, dtype in PRECISIONS.items()}
            yield figure(
                f"decode {width}x{height}, {passes} passes",
                "s",
                samples,
                *(f"{side} / {REFERENCE}" for side in limits),
                demand=DEMANDS,
                limit=limits,
                error={side: worst(answers[side], answers[REFERENCE]) for side in limits},
            )


def quality(size: Size) -> Iterator[Figure]:
    rgb, latent = picture(*size)
    decode = makers()[OURS]()
    answers = {passes: decode(rgb, latent, passes) for passes in PASSES}
    sides = {f"{passes} passes": [psnr(answers[passes], answers[8])] for passes in PASSES[:-1]}
    yield figure(f"PSNR against 8 passes, {size[0]}x{size[1]}", "dB", sides)


def taken(side: str, size: Size, batch: int, passes: int) -> dict[str, float]:
    """Seconds and peak memory of one decode in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.decode", "--one", json.dumps([side, size, batch, passes])]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.splitlines()[-1]
    )


def one(side: str, size: Size, batch: int, passes: int) -> dict[str, float]:
    decode = makers()[side]()
    decode(*picture(64, 64), 1)  # what is loaded at the first use is not the picture's
    rgb, latent = picture(*size, batch)
    spent: list[float] = []
    peak = measure.peak_memory(lambda: spent.append(measure.seconds(lambda: decode(rgb, latent, passes))))
    return {"seconds": spent[0], "bytes": peak}


def memory(size: Size, rounds: int) -> Iterator[Figure]:
    cases = {f"{side}, {passes} passes": (side, passes) for side in makers() for passes in (1, 8)}
    sides: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (side, passes) in cases.items():
            sides[name].append(taken(side, size, 1, passes)["bytes"] / 2**20)
    ratios = [f"{side}, 8 passes / {REFERENCE}, 1 passes" for side in makers()]
    yield figure(
        f"peak memory of a decode, {size[0]}x{size[1]}", "MiB", sides, *ratios, demand=dict.fromkeys(ratios[1:], 1)
    )


def scale(points: tuple[tuple[Size, int], ...], largest_reference: int) -> Iterator[Figure]:
    for size, batch in points:
        fitting = [side for side in makers() if side != REFERENCE or batch * size[0] * size[1] <= largest_reference]
        runs = {side: taken(side, size, batch, 1) for side in fitting}
        for key, unit, divisor in (("seconds", "s", 1), ("bytes", "MiB", 2**20)):
            sides = {side: [run[key] / divisor] for side, run in runs.items()}
            about = {"size": size, "batch": batch}
            yield figure(f"{size[0]}x{size[1]}, batch {batch}, 1 pass: {key}", unit, sides, scale=about)


def figures(about: dict[str, Any], full: bool) -> Iterator[Figure]:
    yield from speed(about, FULL if full else QUICK)
    yield from quality((768, 768) if full else (512, 512))
    yield from memory((512, 512), rounds=3)
    if full:
        yield from memory((1024, 1024), rounds=1)
    yield from scale(FULL_SCALE if full else QUICK_SCALE, largest_reference=1536**2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode.json"))
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(*arguments.one)))
    else:
        about = measure.machine(DEVICE, PRECISIONS.values(), HEAD_DIM)
        found: list[Figure] = []
        for each in figures(about, arguments.full):
            found.append(each)
            write(arguments.out, about, found)


if __name__ == "__main__":
    main()
