"""What is done to pictures: colour under transparency, checkerboard, compositing; PIL at the end, as the rim."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lib_layerdiffuse.tensors import Rgb, Rgba

PYRAMID_RATIO = 1.2  # from one level to the next; the released encoders were trained with it
SMALLEST_ALPHA = 1e-8  # keeps the mean colour of an empty picture defined (black)

CHECKER_GREYS = (0.45, 0.55)  # both close to the middle: black and white subjects stand out alike
CHECKER_SIZE = 16  # pixels; still visible as squares when 1024 px are shown as a thumbnail


def pad_colors(rgba: Rgba) -> Rgb:
    """Colours spread into the transparent parts, so that no hidden colour shines through at the edges.

    What is opaque stays as it is; the further into the transparent, the wider the area whose mean it takes.
    """
    color, alpha = rgba.float().split([3, 1], dim=1)
    levels = pyramid(torch.cat([color * alpha, alpha], dim=1))
    smallest_color, smallest_alpha = levels[-1].sum(dim=(2, 3), keepdim=True).split([3, 1], dim=1)
    padded = smallest_color / smallest_alpha.clamp(min=SMALLEST_ALPHA)
    for level in reversed(levels):
        premultiplied, alpha = level.split([3, 1], dim=1)
        below = F.interpolate(padded, size=level.shape[2:], mode="bilinear", align_corners=False)
        padded = premultiplied + below * (1 - alpha)
    return padded.clamp(0, 1)


def pyramid(picture: Tensor) -> list[Tensor]:
    """The picture [B, C, H, W] and ever smaller ones, until the shorter side is 1."""
    levels = [picture]
    while min(levels[-1].shape[2:]) > 1:
        height, width = (int(side / PYRAMID_RATIO) for side in levels[-1].shape[2:])
        levels.append(shrink(levels[-1], height, width))
    return levels


def shrink(picture: Tensor, height: int, width: int) -> Tensor:
    """Every new pixel is the mean over the area it covers: [B, C, H, W] -> [B, C, height, width]."""
    rows = area_weights(picture.shape[2], height).to(picture)
    columns = area_weights(picture.shape[3], width).to(picture)
    return rows @ picture @ columns.T


def area_weights(size: int, new_size: int) -> Tensor:
    """[new_size, size]: how much of each old pixel goes into each new one; rows add up to 1."""
    edges = torch.arange(new_size + 1) * (size / new_size)
    pixels = torch.arange(size)
    overlaps = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return overlaps.clamp(min=0) * (new_size / size)


def checkerboard(height: int, width: int) -> Rgb:
    """The background that means "transparent": [1, 3, height, width]."""
    squares = torch.arange(height)[:, None] // CHECKER_SIZE + torch.arange(width) // CHECKER_SIZE
    return torch.tensor(CHECKER_GREYS)[squares % 2].expand(1, 3, height, width)


def compose(rgba: Rgba, background: Rgb) -> Rgb:
    """The picture over an opaque background, which may be one for the whole batch."""
    color, alpha = rgba.split([3, 1], dim=1)
    return color * alpha + background.to(rgba) * (1 - alpha)


def over_grey(image: Image.Image) -> Image.Image:
    """The image without transparency, as transparent latents show it to the VAE: composed over the middle grey."""
    pixels = from_pil(image)[None]
    return to_pil(compose(pixels, torch.tensor(0.5))[0]) if pixels.shape[1] == 4 else image


def to_pil(picture: Tensor) -> Image.Image:
    """[3 or 4, H, W], clipped to [0, 1] -> an RGB or RGBA image, to the nearest of its 256 values."""
    values = (picture.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())


def from_pil(image: Image.Image) -> Tensor:
    """Any image -> [C, H, W] in [0, 1]: C is 4 where it can be transparent, else 3."""
    transparent = image.getbands()[-1] in "Aa" or "transparency" in image.info
    pixels = np.array(image.convert("RGBA" if transparent else "RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
