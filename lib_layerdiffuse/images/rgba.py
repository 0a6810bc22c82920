"""What is done to pictures: colour under transparency, checkerboard, compositing; PIL at the end, as the rim."""

import hashlib
from enum import Enum
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageChops
from torch import Tensor
from torch.nn import functional as F

from lib_layerdiffuse.images.reading import can_be_transparent
from lib_layerdiffuse.tensors import Argb, Rgb, Rgba

PYRAMID_RATIO = 1.2  # from one level to the next; the released encoders were trained with it
SMALLEST_ALPHA = 1e-8  # keeps the colour of what is empty defined (black)

Box: TypeAlias = tuple[int, int, int, int]  # left, upper, right and lower edge, in pixels

# Of a mask with transparency: from which alpha on its colours count, and how far apart those of a drawing are.
SEEN, DIFFERENT = 16, 127

GREY = torch.tensor(0.5)  # what transparent latents have behind them

CHECKER_GREYS = (0.45, 0.55)  # both close to the middle: black and white subjects stand out alike
CHECKER_SIZE = 16  # pixels; still visible as squares when 1024 px are shown as a thumbnail


def pad_colors(rgba: Rgba) -> Rgb:
    """Colours spread into the transparent parts, so that no hidden colour shines through at the edges."""
    color, alpha = rgba.float().split([3, 1], dim=1)
    return spread(color * alpha, alpha).clamp(0, 1)


def padded_argb(rgba: Rgba) -> Argb:
    """As the transparent encoder reads it."""
    return torch.cat([rgba[:, 3:].float(), pad_colors(rgba)], dim=1)


def fill_masked(rgba: Rgba, mask: Tensor) -> Rgba:
    """What surrounds the masked part, colour and alpha, spread into it. mask: [B, 1, H, W], 1 is masked."""
    color, alpha = rgba.float().split([3, 1], dim=1)
    known = 1 - mask
    premultiplied, alpha = spread(torch.cat([color * alpha, alpha], dim=1) * known, known).split([3, 1], dim=1)
    return torch.cat([premultiplied / alpha.clamp(min=SMALLEST_ALPHA), alpha], dim=1).clamp(0, 1)


def spread(weighted: Tensor, weight: Tensor) -> Tensor:
    """Values known to the degree of `weight`, and multiplied by it, spread to where it is less than 1.

    What is known stays as it is; the further into the unknown, the wider the area whose mean it takes.
    weighted: [B, C, H, W]; weight: [B, 1, H, W].
    """
    kinds = [weighted.shape[1], 1]
    levels = pyramid(torch.cat([weighted, weight], dim=1))
    smallest, smallest_weight = levels[-1].sum(dim=(2, 3), keepdim=True).split(kinds, dim=1)
    filled = smallest / smallest_weight.clamp(min=SMALLEST_ALPHA)
    for level in reversed(levels):
        weighted, weight = level.split(kinds, dim=1)
        below = F.interpolate(filled, size=level.shape[2:], mode="bilinear", align_corners=False)
        filled = weighted + below * (1 - weight)
    return filled


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


def over_grey(image: Image.Image) -> Rgb:
    """Any image over the middle grey, as transparent latents show it to the VAE: [1, 3, H, W]."""
    pixels = from_pil(image)[None]
    return compose(pixels, GREY) if pixels.shape[1] == 4 else pixels


def flattened(image: Image.Image) -> Image.Image:
    """An RGB image: the image itself where it is opaque, else over the middle grey."""
    return to_pil(over_grey(image)[0]) if can_be_transparent(image) else image.convert("RGB")


def over(foreground: Image.Image, background: Image.Image) -> Image.Image:
    """The foreground composed over the background of the same size, every value rounded once.

    RGBA where the background is transparent somewhere, else RGB.
    """
    color, cover = from_pil(foreground.convert("RGBA")).split([3, 1])
    below, there = from_pil(background.convert("RGBA")).split([3, 1])
    color = color * cover + below * there * (1 - cover)
    alpha = cover + there * (1 - cover)
    picture = torch.cat([color / alpha.clamp(min=SMALLEST_ALPHA), alpha])
    return to_pil(picture[:3] if (there == 1).all() else picture)


def blended(before: Image.Image, after: Image.Image, mask: Image.Image) -> Image.Image:
    """From one RGBA picture to another of the same size: the first where the mask (L) is 0, the second where it is 255.

    Both bit for bit; in between, their premultiplied values are mixed, so that no hidden colour makes a fringe.
    """
    weight = from_pil(mask)[:1]
    pixels = torch.stack([from_pil(before.convert("RGBA")), from_pil(after.convert("RGBA"))])
    color, alpha = pixels.split([3, 1], dim=1)
    mixed = torch.lerp(*torch.cat([color * alpha, alpha], dim=1), weight)  # type: ignore[call-overload]
    mixed[:3] /= mixed[3:].clamp(min=SMALLEST_ALPHA)
    return to_pil(torch.where(weight == 0, pixels[0], torch.where(weight == 1, pixels[1], mixed)))


def as_mask(image: Image.Image) -> Image.Image:
    """A mask of any mode as L: how white it is over black, half where its alpha is; or, of one colour, its alpha."""
    rgba = image.convert("RGBA")
    white, alpha = rgba.convert("L"), rgba.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return white
    pixels = np.asarray(rgba)
    seen = pixels[pixels[..., 3] >= SEEN, :3]
    drawn = seen.size and not np.ptp(seen, axis=1).any() and np.ptp(seen) > DIFFERENT
    return ImageChops.multiply(white, alpha) if drawn else alpha


def to_pil(picture: Tensor) -> Image.Image:
    """[3 or 4, H, W], clipped to [0, 1] -> an RGB or RGBA image, to the nearest of its 256 values."""
    values = (picture.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).cpu().numpy())


def from_pil(image: Image.Image) -> Tensor:
    """Any image -> [C, H, W] in [0, 1]: C is 4 where it can be transparent, else 3."""
    pixels = np.array(image.convert("RGBA" if can_be_transparent(image) else "RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def has_alpha(image: Image.Image) -> bool:
    """Whether any pixel of the image is not opaque."""
    return alpha_range(image) != (255, 255)


def alpha_range(image: Image.Image) -> tuple[int, int]:
    """Lowest and highest alpha of an image of any mode."""
    lowest, highest = image.convert("RGBA").getchannel("A").getextrema()
    return lowest, highest  # type: ignore[return-value]  # of one channel


def content_hash(image: Image.Image) -> str:
    """Ten digits that are the same for the same pixels, whatever file they came in."""
    rgba = image.convert("RGBA")
    return hashlib.sha256(f"{rgba.width}x{rgba.height}".encode() + rgba.tobytes()).hexdigest()[:10]


class ResizeMode(str, Enum):
    """How a supplied image is brought to the size of the picture."""

    JUST_RESIZE = "Just Resize"
    CROP_AND_RESIZE = "Crop and Resize"
    RESIZE_AND_FILL = "Resize and Fill"


def fit(image: Image.Image, mode: ResizeMode, width: int, height: int) -> Image.Image:
    """The image in the given size: stretched, cut where it is too long, or filled up with its border's colour."""
    if image.size == (width, height):
        return image
    image = image.convert("RGBA").convert("RGBa")  # premultiplied: hidden colours stay hidden
    if mode is ResizeMode.RESIZE_AND_FILL:
        scale = min(width / image.width, height / image.height)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        inner = image.resize(size, Image.Resampling.LANCZOS)
        fitted = Image.new("RGBa", (width, height), border_color(image))
        fitted.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
    else:
        box = largest_box(image, width / height) if mode is ResizeMode.CROP_AND_RESIZE else None
        fitted = image.resize((width, height), Image.Resampling.LANCZOS, box)
    return fitted.convert("RGBA")


def largest_box(image: Image.Image, aspect: float) -> tuple[float, float, float, float]:
    """The middle of the image, as much of it as has that width for its height: left, upper, right and lower edge."""
    width, height = min(image.width, image.height * aspect), min(image.height, image.width / aspect)
    left, upper = (image.width - width) / 2, (image.height - height) / 2
    return left, upper, left + width, upper + height


def border_color(image: Image.Image) -> tuple[int, ...]:
    """The median of each channel over the outermost pixels."""
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return tuple(int(value) for value in np.median(border, axis=0))
