"""3×3 convolutions on a processor with a quarter of the products: Winograd's F(4×4, 3×3) (Lavin, Gray: 1509.09308).

A tile of 6×6 pixels makes 4×4 of the answer. Tile and kernel, as polynomials taken at 0, 1, -1, 2, -2 and infinity in
both directions, are multiplied point by point: 36 products instead of 144, each a matrix product over the channels.
Rounding grows about tenfold, to some 1e-6 of the values in float32; it would be too much in half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from lib_layerdiffuse.nets.scratch import Scratch

TILE = 4  # pixels of the answer, in each direction
REACH = TILE + 2  # pixels that they are made of
POINTS = REACH**2


def both(matrix: list[list[float]]) -> Tensor:
    """For rows and columns at once."""
    return torch.kron(torch.tensor(matrix), torch.tensor(matrix))


OF_TILE = both(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1.0],
    ]
)
OF_KERNEL = both([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24.0]]) / 24**2
OF_ANSWER = both([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1.0]])


def turned(weights: Tensor, scratch: Scratch) -> Tensor:
    """A convolution's [out, in, 3, 3] -> what `convolve` takes, [POINTS, in, out], in scratch memory."""
    width_out, width_in, _, _ = weights.shape
    kernel = scratch("kernel", width_out, POINTS, width_in)
    turn(weights, kernel)
    return kernel.permute(1, 2, 0)


def turn(weights: Tensor, kernel: Tensor) -> None:
    """[out, in, 3, 3] into [out, POINTS, in]."""
    torch.matmul(OF_KERNEL, weights.permute(0, 2, 3, 1).flatten(1, 2), out=kernel)


def convolve(x: Tensor, kernel: Tensor, bias: Tensor, scratch: Scratch) -> Tensor:
    """Without padding: [B, in, H + 2, W + 2] -> [B, out, H, W], channels last.

    Everything is float32; the answer lies in scratch memory if TILE divides H and W. kernel: from `turned`.
    """
    batch, width_in = x.shape[:2]
    height, width = x.shape[2] - 2, x.shape[3] - 2
    if height % TILE or width % TILE:
        x = F.pad(x, (0, -width % TILE, 0, -height % TILE))
    width_out, down, across = kernel.shape[2], -(-height // TILE), -(-width // TILE)
    over_b, over_c, over_h, over_w = x.stride()
    tiles = x.as_strided(
        (REACH, REACH, batch, down, across, width_in), (over_h, over_w, over_b, TILE * over_h, TILE * over_w, over_c)
    )
    count = batch * down * across
    room = count | 1  # rows of an even number of tiles begin at the same lines of a cache, and drive each other out
    gathered = scratch("gathered", POINTS, room, width_in)
    gathered[:, :count].view(tiles.shape).copy_(tiles)
    factors = torch.mm(OF_TILE, gathered.flatten(1), out=scratch("factors", POINTS, room * width_in))
    products = scratch("products", POINTS, room, width_out)
    torch.bmm(factors.view_as(gathered), kernel, out=products)
    pixels = torch.mm(OF_ANSWER, products.flatten(1), out=scratch("pixels", TILE**2, room * width_out))
    ordered = pixels.view(TILE**2, room, width_out)[:, :count].view(TILE, TILE, batch, down, across, width_out)
    ordered = ordered.permute(2, 3, 0, 4, 1, 5)
    answer = torch.add(ordered, bias, out=scratch("answer", *ordered.shape))
    answer = answer.view(batch, down * TILE, across * TILE, width_out)[:, :height, :width]
    return answer.contiguous().permute(0, 3, 1, 2)
