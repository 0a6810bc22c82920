"""What torch has no fast operation for on a processor, compiled by numba where there is one (Forge has it by facexlib).

Each kernel takes NumPy views of float32 memory, channels last, runs in the thread that calls it and holds no lock of
Python's. Its loops are long and write to one place: only then does LLVM make vectors of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from lib_layerdiffuse.nets.winograd import REACH, TILE

KEYS = 512  # at once: with their values 32 KiB, which a core's first cache holds
BLOCK = 1024  # numbers of each column of tiles that are worked on at once, or one tile

ZERO, ONE, TWO, FOUR, FIVE, EIGHT = (np.float32(number) for number in (0, 1, 2, 4, 5, 8))
LOG2_E = np.float32(np.log2(np.e))
LOWEST = np.float32(-126)  # 2^x of less is no normal float32 number
TO_INTEGER = np.float32(1.5 * 2**23)  # a float32 number so large that adding it rounds to whole numbers
# 2^x for |x| <= 1/2 within 2e-7, through the zeros of Chebyshev's polynomial.
_NODES = np.polynomial.chebyshev.chebpts1(6) / 2
C0, C1, C2, C3, C4, C5 = np.polynomial.polynomial.polyfit(_NODES, 2.0**_NODES, 5).astype(np.float32)

SUMS = {"reassoc", "contract", "nsz"}  # may be taken in any order, which vectors need


def kernel(signature: str, fastmath: set[str]) -> Callable[[Any], Any]:
    """Compiled at once, so that what numba cannot do shows on import; kept on disk where it may write to a folder."""

    def decorate(function: Any) -> Any:
        compile_with = partial(njit, signature, nogil=True, error_model="numpy", fastmath=fastmath)
        try:
            return compile_with(cache=True)(function)
        except RuntimeError:
            return compile_with()(function)

    return decorate


@intrinsic
def as_float(_: Any, bits: Any) -> Any:
    return types.float32(types.int32), lambda context, builder, _, given: builder.bitcast(given[0], ir.FloatType())


@intrinsic
def as_bits(_: Any, number: Any) -> Any:
    return types.int32(types.float32), lambda context, builder, _, given: builder.bitcast(given[0], ir.IntType(32))


@njit(fastmath={"contract"})  # not in any order: rounding by TO_INTEGER would go
def exp2(x):
    """2^x, for -126 <= x < 128: the fraction by a polynomial, the whole part added to its exponent."""
    whole = x + TO_INTEGER
    rest = x - (whole - TO_INTEGER)
    power = C0 + rest * (C1 + rest * (C2 + rest * (C3 + rest * (C4 + rest * C5))))
    return as_float(np.int32(as_bits(power) + (as_bits(whole) << 23)))


@njit(forceinline=True)
def eight(rows, first, last):
    """The columns `first` to `last` of eight rows."""
    return (
        rows[0, first:last], rows[1, first:last], rows[2, first:last], rows[3, first:last],
        rows[4, first:last], rows[5, first:last], rows[6, first:last], rows[7, first:last],
    )  # fmt: skip


@njit(forceinline=True)
def column(rows, i):
    """Eight numbers."""
    return (rows[0, i], rows[1, i], rows[2, i], rows[3, i], rows[4, i], rows[5, i], rows[6, i], rows[7, i])


@njit(forceinline=True, fastmath=SUMS)
def weight(q, k, i):
    """Of key i for a query."""
    return exp2(
        q[0] * k[0][i] + q[1] * k[1][i] + q[2] * k[2][i] + q[3] * k[3][i]
        + q[4] * k[4][i] + q[5] * k[5][i] + q[6] * k[6][i] + q[7] * k[7][i]
    )  # fmt: skip


@njit(forceinline=True, fastmath=SUMS)
def gathered(sums, w, v, i):
    """The sums of weighted values and of the weights, with those of key i."""
    return (
        sums[0] + w * v[0][i], sums[1] + w * v[1][i], sums[2] + w * v[2][i], sums[3] + w * v[3][i],
        sums[4] + w * v[4][i], sums[5] + w * v[5][i], sums[6] + w * v[6][i], sums[7] + w * v[7][i], sums[8] + w,
    )  # fmt: skip


@kernel("void(f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,:,::1])", SUMS)
def attend(queries, keys, values, answers):
    """[heads, 8, Q] and twice [heads, 8, K] -> [heads, 8, Q]; weights 2^(query · key), where |query · key| <= 100.

    Two queries at a time, for some keys first their weights and then what these gather: all sums stay in registers.
    """
    heads, _, count = queries.shape
    many = keys.shape[2]
    sums = np.empty((count, 9), np.float32)
    of_a, of_b = np.empty(KEYS, np.float32), np.empty(KEYS, np.float32)
    for head in range(heads):
        sums[:] = 0
        for first in range(0, many, KEYS):
            last = min(first + KEYS, many)
            k, v = eight(keys[head], first, last), eight(values[head], first, last)
            for a in range(0, count, 2):
                b = min(a + 1, count - 1)  # of an odd number the last query twice
                query_a, query_b = column(queries[head], a), column(queries[head], b)
                for i in range(last - first):
                    of_a[i] = weight(query_a, k, i)
                    of_b[i] = weight(query_b, k, i)
                sums_a = sums_b = (ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO, ZERO)
                for i in range(last - first):
                    sums_a, sums_b = gathered(sums_a, of_a[i], v, i), gathered(sums_b, of_b[i], v, i)
                for number in range(9):
                    sums[a, number] += sums_a[number]
                    if b != a:
                        sums[b, number] += sums_b[number]
        for number in range(8):
            for query in range(count):
                answers[head, number, query] = sums[query, number] / sums[query, 8]


@njit(forceinline=True, fastmath={"contract"})
def silu(x):
    return x / (ONE + exp2(min(max(-x * LOG2_E, LOWEST), -LOWEST)))


@njit(fastmath={"contract"})
def of_tile(point, x0, x1, x2, x3, x4, x5, answer):
    """Six pixels as a polynomial, taken at a point."""
    if point == 0:
        for i in range(answer.size):
            answer[i] = FOUR * x0[i] - FIVE * x2[i] + x4[i]
    elif point == 1:
        for i in range(answer.size):
            answer[i] = (x3[i] + x4[i]) - FOUR * (x1[i] + x2[i])
    elif point == 2:
        for i in range(answer.size):
            answer[i] = (x4[i] - x3[i]) + FOUR * (x1[i] - x2[i])
    elif point == 3:
        for i in range(answer.size):
            answer[i] = (x4[i] - x2[i]) + TWO * (x3[i] - x1[i])
    elif point == 4:
        for i in range(answer.size):
            answer[i] = (x4[i] - x2[i]) - TWO * (x3[i] - x1[i])
    else:
        for i in range(answer.size):
            answer[i] = FOUR * x1[i] - FIVE * x3[i] + x5[i]


@njit(fastmath={"contract"})
def of_answer(pixel, x0, x1, x2, x3, x4, x5, answer):
    """One of four pixels, from the six points of a product of polynomials."""
    if pixel == 0:
        for i in range(answer.size):
            answer[i] = x0[i] + (x1[i] + x2[i]) + (x3[i] + x4[i])
    elif pixel == 1:
        for i in range(answer.size):
            answer[i] = (x1[i] - x2[i]) + TWO * (x3[i] - x4[i])
    elif pixel == 2:
        for i in range(answer.size):
            answer[i] = (x1[i] + x2[i]) + FOUR * (x3[i] + x4[i])
    else:
        for i in range(answer.size):
            answer[i] = (x1[i] - x2[i]) + EIGHT * (x3[i] - x4[i]) + x5[i]


@kernel("void(f4[:,:,::1], f4[::1], f4[::1], i8, i8, i8, i8, f4[:,::1])", {"contract"})
def into_tiles(rows, scale, shift, top, left, down, across, factors):
    """Factors of `down` · `across` tiles of a map that is normalised and activated first.

    rows: [H, W, C]; scale, shift: [C]; top: the first row; left: the first tile; factors: [POINTS, tiles · C].
    """
    height, width, channels = rows.shape
    block = max(1, BLOCK // channels)
    lines = np.zeros((REACH, TILE, (block + 1) * channels), np.float32)
    turned = np.zeros((TILE, (block + 1) * channels), np.float32)
    for first in range(0, across, block):
        count = min(block, across - first)
        for tile_row in range(down):
            y0 = top + tile_row * TILE - 1
            for y in range(y0 if tile_row == 0 else y0 + 2, y0 + REACH):
                line = lines[(y + 1) % REACH]
                for column in range(count * TILE + 2):
                    x = (left + first) * TILE + column - 1
                    tile = column // TILE
                    pixel = line[column % TILE, tile * channels : (tile + 1) * channels]
                    if 0 <= y < height and 0 <= x < width:
                        source = rows[y, x]
                        for c in range(channels):
                            pixel[c] = silu(source[c] * scale[c] + shift[c])
                    else:
                        pixel[:] = 0
            begin = (tile_row * across + first) * channels
            end = begin + count * channels
            l0, l1, l2 = lines[(y0 + 1) % REACH], lines[(y0 + 2) % REACH], lines[(y0 + 3) % REACH]
            l3, l4, l5 = lines[(y0 + 4) % REACH], lines[(y0 + 5) % REACH], lines[(y0 + 6) % REACH]
            size = count * channels
            for i in range(REACH):
                for column in range(TILE):
                    upto = size + (column < 2) * channels
                    of_tile(
                        i,
                        l0[column, :upto], l1[column, :upto], l2[column, :upto],
                        l3[column, :upto], l4[column, :upto], l5[column, :upto],
                        turned[column, :upto],
                    )  # fmt: skip
                for j in range(REACH):
                    of_tile(
                        j,
                        turned[0, :size], turned[1, :size], turned[2, :size], turned[3, :size],
                        turned[0, channels : channels + size], turned[1, channels : channels + size],
                        factors[REACH * i + j, begin:end],
                    )  # fmt: skip


@kernel("void(f4[:,::1], f4[::1], i8, i8, f4[:,:,::1])", {"contract"})
def out_of_tiles(products, bias, left, across, rows):
    """Products [POINTS, tiles · C] to as many rows of tiles as [H, W, C] has, from tile `left` on, the bias added."""
    height, width, channels = rows.shape
    down = (height + TILE - 1) // TILE
    block = max(1, BLOCK // channels)
    turned = np.empty((REACH, block * channels), np.float32)
    line = np.empty((TILE, block * channels), np.float32)
    for first in range(0, across, block):
        count = min(block, across - first)
        size = count * channels
        for tile_row in range(down):
            begin = (tile_row * across + first) * channels
            end = begin + size
            for i in range(min(TILE, height - tile_row * TILE)):
                for j in range(REACH):
                    of_answer(
                        i,
                        products[j, begin:end], products[REACH + j, begin:end], products[2 * REACH + j, begin:end],
                        products[3 * REACH + j, begin:end], products[4 * REACH + j, begin:end],
                        products[5 * REACH + j, begin:end], turned[j, :size],
                    )  # fmt: skip
                for j in range(TILE):
                    of_answer(
                        j, turned[0, :size], turned[1, :size], turned[2, :size], turned[3, :size], turned[4, :size],
                        turned[5, :size], line[j, :size],
                    )  # fmt: skip
                row = rows[tile_row * TILE + i]
                for column in range(min(count * TILE, width - (left + first) * TILE)):
                    tile = column // TILE
                    pixel = row[(left + first) * TILE + column]
                    found = line[column % TILE, tile * channels : (tile + 1) * channels]
                    for c in range(channels):
                        pixel[c] = found[c] + bias[c]


@kernel("void(f4[:,:,::1], f4[:,:,::1], i8, f8[:,::1])", SUMS)
def settle(source, target, offset, moments):
    """Copy [H, W, c] into [H, W, C] from channel `offset` on, and their mean and variance into [2, C], float64."""
    height, width, channels = source.shape
    pivot, sums, squares = source[0, 0].copy(), np.empty(channels, np.float32), np.empty(channels, np.float32)
    total = np.zeros((2, channels), np.float64)
    for y in range(height):
        sums[:] = 0
        squares[:] = 0
        for x in range(width):
            found, place = source[y, x], target[y, x, offset : offset + channels]
            for c in range(channels):
                place[c] = found[c]
            for c in range(channels):
                sums[c] += found[c] - pivot[c]
            for c in range(channels):
                squares[c] += (found[c] - pivot[c]) * (found[c] - pivot[c])
        for c in range(channels):
            total[0, c] += sums[c]
            total[1, c] += squares[c]
    for c in range(channels):
        mean = total[0, c] / (height * width)
        moments[0, offset + c] = pivot[c] + mean
        moments[1, offset + c] = total[1, c] / (height * width) - mean * mean
