"""How close transparent pictures come to others: in colour over nine backgrounds, and in their alpha.

Colour is compared as it is seen, over each background in turn, and averaged (arXiv 2507.09308): what is hidden does not
count. Alpha is compared as in matting (Rhemann et al., CVPR 2009). LPIPS fetches its network at the first use.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import (
    learned_perceptual_image_patch_similarity,
    structural_similarity_index_measure,
)

from lib_layerdiffuse.cli.files import LOSSLESS
from lib_layerdiffuse.images.reading import read_file
from lib_layerdiffuse.images.rgba import compose, from_pil
from lib_layerdiffuse.tensors import Rgb, Rgba

BACKGROUNDS: Mapping[str, tuple[float, float, float]] = {
    "grey": (128 / 255, 128 / 255, 128 / 255),
    "black": (0, 0, 0),
    "white": (1, 1, 1),
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "yellow": (1, 1, 0),
    "cyan": (0, 1, 1),
    "magenta": (1, 0, 1),
}
# Pixels of a side: half of SSIM's window, which sees the picture mirrored around it; what AlexNet's strides make 1.
SMALLEST = {"SSIM": 6, "LPIPS": 31}
MOST_DB = 100.0  # PSNR of pictures that are equal, so that means stay numbers
EDGE_SIGMA = 1.4  # pixels, of the Gaussian whose derivative finds edges


def psnr(truth: Tensor, result: Tensor) -> float:
    """dB, of values in 0..1."""
    error = (truth - result).square().mean().item()
    return min(MOST_DB, -10 * math.log10(error)) if error else MOST_DB


def ssim(truth: Tensor, result: Tensor) -> float:
    """At most 1, of values in 0..1."""
    found = structural_similarity_index_measure(result, truth, data_range=1.0)
    assert isinstance(found, Tensor)  # not the tuple that other arguments would give
    return found.item()


def over_backgrounds(rgba: Rgba) -> list[Rgb]:
    """What is seen over each of the nine."""
    return [compose(rgba, rgba.new_tensor(colour).view(1, 3, 1, 1)) for colour in BACKGROUNDS.values()]


def colour_metrics(truth: Rgba, result: Rgba, lpips: bool = False) -> dict[str, float]:
    """Means over the backgrounds: psnr in dB; ssim, at most 1; lpips (AlexNet), where less is nearer."""
    truth, result = truth.double(), result.double()  # ssim loses its digits where a picture is even
    pairs = list(zip(over_backgrounds(truth), over_backgrounds(result)))
    found = {
        "psnr": fmean(psnr(*pair) for pair in pairs),
        "ssim": fmean(ssim(*pair) for pair in pairs),
    }
    if lpips:
        of_each = (
            learned_perceptual_image_patch_similarity(b.float(), a.float(), net_type="alex", normalize=True).item()
            for a, b in pairs
        )
        found["lpips"] = fmean(of_each)
    return found


def alpha_metrics(truth: Rgba, result: Rgba) -> dict[str, float]:
    """Means over the batch: absolute error of a pixel, and summed (in thousands); squared error of a pixel; and of the
    edges, the squared difference of the alphas' slopes, summed (in thousands)."""
    a, b = truth[:, 3:], result[:, 3:]
    difference = (a - b).abs()
    return {
        "alpha mae": difference.mean().item(),
        "alpha sad": difference.sum().item() / len(truth) / 1000,
        "alpha mse": difference.square().mean().item(),
        "alpha edge": (slope(a) - slope(b)).square().sum().item() / len(truth) / 1000,
    }


def slope(alpha: Tensor) -> Tensor:
    """How steeply it rises at each pixel, by the derivatives of a Gaussian. [B, 1, H, W] -> the same."""
    reach = math.ceil(3 * EDGE_SIGMA)
    x = torch.arange(-reach, reach + 1, dtype=alpha.dtype, device=alpha.device)
    bell = torch.exp(-x.square() / (2 * EDGE_SIGMA**2))
    bell = bell / bell.sum()
    rising = -x / EDGE_SIGMA**2 * bell
    kernel = torch.stack([torch.outer(bell, rising), torch.outer(rising, bell)])[:, None]
    across, down = F.conv2d(F.pad(alpha, [reach] * 4, mode="replicate"), kernel).split(1, dim=1)
    return torch.hypot(across, down)


def compare(truth: Rgba, result: Rgba, lpips: bool = False) -> dict[str, float]:
    return colour_metrics(truth, result, lpips) | alpha_metrics(truth, result)


# --- files ---


def pictures(paths: Iterable[Path]) -> list[Path]:
    """Those of them that are pictures, in order."""
    return sorted(path for path in paths if path.suffix.lower() in LOSSLESS)


def check_some(found: Collection[object], folder: Path) -> None:
    if not found:
        raise ValueError(f"There are no pictures in {folder}: expected files ending in {', '.join(LOSSLESS)}.")


def read(path: Path) -> Rgba:
    return from_pil(read_file(path).convert("RGBA"))[None]


def by_name(folder: Path) -> dict[str, Path]:
    """The folder's pictures by their names without endings. Raises ValueError where two have the same."""
    found: dict[str, Path] = {}
    for path in pictures(folder.iterdir()):
        if other := found.get(path.stem):
            raise ValueError(f"{folder} has two pictures of one name, {other.name} and {path.name}. Keep one of them.")
        found[path.stem] = path
    return found


def compare_folders(truth: Path, result: Path, lpips: bool = False) -> dict[str, float]:
    """The means over all pictures, or the figures of two that are named themselves.

    Raises ValueError where the two do not belong together.
    """
    if truth.is_file() and result.is_file():
        return compare_files(truth, result, lpips) | {"pictures": 1}
    truths, results = by_name(truth), by_name(result)
    if missing := sorted(truths.keys() ^ results.keys()):
        raise ValueError(f"{truth} and {result} should have pictures of the same names; only one has {missing[0]}.")
    check_some(truths, truth)
    of_each = [compare_files(path, results[name], lpips) for name, path in truths.items()]
    means = {key: fmean(one[key] for one in of_each) for key in of_each[0]}
    return means | {"pictures": len(of_each)}


def compare_files(truth: Path, result: Path, lpips: bool = False) -> dict[str, float]:
    a, b = read(truth), read(result)
    if a.shape != b.shape:
        raise ValueError(f"{truth.stem} has {size(a)} pixels in {truth.parent} and {size(b)} in {result.parent}.")
    figure = "LPIPS" if lpips else "SSIM"
    if min(a.shape[2:]) < SMALLEST[figure]:
        raise ValueError(f"{truth} has {size(a)} pixels, but {figure} needs {SMALLEST[figure]} a side. Leave it out.")
    return compare(a, b, lpips)


def size(picture: Tensor) -> str:
    return f"{picture.shape[3]}x{picture.shape[2]}"
