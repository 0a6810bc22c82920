"""Writes down what the sampler gave, so that two servers can be compared without comparing pictures.

One JSON line for each picture's sampler latent, unless a hires pass made it, appended to the file that the environment
variable LAYERDIFFUSE_PROBE names. Reads, never changes: a server with this extension makes the pictures of one without.
"""

import json
import os
from pathlib import Path

import torch
from modules import scripts

PROBED_VALUES = 64


def rounded(value: torch.Tensor) -> float:
    """Seven digits, which is what single precision holds."""
    return float(f"{value.item():.7g}")


def statistics(latent: torch.Tensor) -> dict:
    """Numbers that identify a latent [C, H, W]: its moments, and values at even distances through it."""
    flat = latent.detach().flatten().to("cpu", torch.float64)
    at = torch.linspace(0, flat.numel() - 1, PROBED_VALUES).round().long()
    return {
        "mean": rounded(flat.mean()),
        "std": rounded(flat.std()),
        "min": rounded(flat.min()),
        "max": rounded(flat.max()),
        "shape": list(latent.shape),
        "values": [rounded(value) for value in flat[at]],
    }


def record(samples, seeds) -> None:
    lines = [json.dumps({"seed": seed, **statistics(latent)}) for seed, latent in zip(seeds, samples)]
    with Path(os.environ["LAYERDIFFUSE_PROBE"]).open("a", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)


class Probe(scripts.Script):
    def title(self):
        return "LayerDiffuse probe"

    def show(self, is_img2img):
        return scripts.AlwaysVisible if "LAYERDIFFUSE_PROBE" in os.environ else False

    def post_sample(self, p, ps, *args):
        """After the hires pass the host hands over decoded pictures here, which are not recorded."""
        if not getattr(ps.samples, "already_decoded", False):
            record(ps.samples, p.seeds)
