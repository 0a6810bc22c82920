"""What torch has no fast operation for on a processor, compiled by numba where there is one (Forge has it by facexlib).

Each kernel takes NumPy views of memory, maps with their channels last, runs in the thread that calls it and holds no
lock of Python's. Numbers are float32, or bfloat16 as its bits in int16, as NumPy has no type for it. They are worked on
as vectors of LANES, which divides all widths here: LLVM by itself often finds no vectors, and on Intel's processors
uses half their width. All is in this one file, as numba's cache on disk notices only changes of a kernel's own file.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.extending import intrinsic, models, overload, register_model

from lib_layerdiffuse.nets.winograd import REACH, TILE

LANES = 16  # numbers of a vector: one register of AVX-512, two of AVX2, each read number serving both
KEYS = 64  # at once: their weights stay in the first cache, and a sum of a thousand float32 numbers would lose digits
BLOCK = 1024  # numbers of each column of tiles that are worked on at once, or one tile

ZERO, ONE, TWO, FOUR, FIVE, EIGHT = (np.float32(number) for number in (0, 1, 2, 4, 5, 8))
LOG2_E = np.float32(np.log2(np.e))
LOWEST = np.float32(-126)  # 2^x of less is no normal float32 number
TO_INTEGER = np.float32(1.5 * 2**23)  # a float32 number so large that adding it rounds to whole numbers
WHOLE = np.float32(256)  # from here to 512, a float32 number's lowest 15 bits are its fraction
BIAS = WHOLE + np.float32(127)  # of float32's exponents


def polynomial(function: Callable[[Any], Any], middle: float, degree: int) -> Any:
    """Its coefficients, for numbers up to 1/2 from the middle, through the zeros of Chebyshev's polynomial."""
    nodes = np.polynomial.chebyshev.chebpts1(degree + 1) / 2 + middle
    return np.polynomial.polynomial.polyfit(nodes, function(nodes), degree).astype(np.float32)


C0, C1, C2, C3, C4, C5 = polynomial(lambda x: 2.0**x, 0, 5)  # within 2e-7
D1, D2, D3, D4 = polynomial(lambda x: (2.0**x - 1 - x) / x, 1 / 2, 3)  # times x within 8e-6

binding.initialize_native_asmparser()  # for the instruction that `rounded` names; numba itself reads no assembler


def kernel(signature: str | list[str]) -> Callable[[Any], Any]:
    """Compiled at once, so that what numba cannot do shows on import; kept on disk where it may write to a folder."""

    def decorate(function: Any) -> Any:
        compile_with = partial(njit, signature, nogil=True, error_model="numpy")
        try:
            return compile_with(cache=True)(function)
        except RuntimeError:
            return compile_with()(function)

    return decorate


# --- vectors ---


class Vector(types.Type):
    """LANES float32 numbers, in a register."""

    def __init__(self) -> None:
        super().__init__("Vector")


VECTOR = Vector()
FLOATS, BITS, HALVES = (ir.VectorType(of, LANES) for of in (ir.FloatType(), ir.IntType(32), ir.IntType(16)))
HALF = 16  # bits


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, FLOATS)


def alike(value: int) -> ir.Constant:
    return ir.Constant(BITS, [value] * LANES)


def spread(builder: Any, kind: Any, value: Any) -> Any:
    """A number in all lanes; of a vector itself."""
    if kind == VECTOR:
        return value
    one = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, ir.Constant(FLOATS, ir.Undefined), alike(0))


def combine(build: Callable[[Any, Any, Any], Any]) -> Any:
    """An operation on two vectors, or a vector and a number."""

    @intrinsic
    def combined(_: Any, a: Any, b: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return build(builder, *(spread(builder, *each) for each in zip(signature.args, given)))

        return VECTOR(a, b), generate

    return combined


def define(operation: Any, name: str) -> None:
    """What Python writes as this operator; a product and a sum may become one instruction."""
    combined = combine(lambda builder, a, b: getattr(builder, name)(a, b, flags=("contract", "nsz")))

    @overload(operation)
    def of_vectors(a, b):
        return (lambda a, b: combined(a, b)) if VECTOR in (a, b) else None


for _operation, _name in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    define(_operation, _name)

# By an estimate of 1 / b and a step of Newton's, which takes a third of the time of a division.
quotient = combine(lambda builder, a, b: builder.fdiv(a, b, flags=("arcp", "contract", "nsz")))
smaller = combine(lambda builder, a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b))
larger = combine(lambda builder, a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))


@combine
def times_power(builder: Any, number: Any, whole: Any) -> Any:
    """number · 2^n, where `whole` is n + TO_INTEGER."""
    exponent = builder.shl(builder.bitcast(whole, BITS), alike(23))
    return builder.bitcast(builder.add(builder.bitcast(number, BITS), exponent), FLOATS)


def convert(build: Callable[[Any, Any], Any]) -> Any:
    """An operation on one vector."""

    @intrinsic
    def converted(_: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return build(builder, *given)

        return VECTOR(x), generate

    return converted


@convert
def fraction(builder: Any, x: Any) -> Any:
    """WHOLE and the fraction of x, where WHOLE <= x < 2 * WHOLE."""
    bits = builder.and_(builder.bitcast(x, BITS), alike(2**15 - 1))
    return builder.bitcast(builder.or_(bits, alike(int(WHOLE.view(np.int32)))), FLOATS)


@convert
def as_exponent(builder: Any, x: Any) -> Any:
    """x - WHOLE as the bits of a float32 number, exponent and fraction; a bit of WHOLE's own makes it negative."""
    return builder.bitcast(builder.shl(builder.bitcast(x, BITS), alike(8)), FLOATS)


def place(context: Any, builder: Any, signature: Any, given: Any, of: Any) -> Any:
    """Where number `given[1]` of an array lies, as a pointer to a vector."""
    array = context.make_array(signature.args[0])(context, builder, given[0])
    return builder.bitcast(builder.gep(array.data, [given[1]]), of.as_pointer())


@intrinsic
def load(_: Any, array: Any, index: Any) -> Any:
    """LANES numbers from there on, of float32 or bfloat16; the array is one line of memory."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        if array.dtype == types.float32:
            return builder.load(place(context, builder, signature, given, FLOATS), align=4)
        bits = builder.load(place(context, builder, signature, given, HALVES), align=2)
        return builder.bitcast(builder.shl(builder.zext(bits, BITS), alike(HALF)), FLOATS)

    return VECTOR(array, types.intp), generate


def rounded(context: Any, builder: Any, value: Any) -> Any:
    """The bits of bfloat16; by the processor's own instruction, if it is compiled for one that has it."""
    if "+avx512bf16" in context.codegen().magic_tuple()[2]:
        instruction = ir.InlineAsm(ir.FunctionType(HALVES, [FLOATS]), "vcvtneps2bf16 $1, $0", "=v,v")
        return builder.call(instruction, [value])
    bits = builder.bitcast(value, BITS)
    odd = builder.and_(builder.lshr(bits, alike(HALF)), alike(1))
    nearest = builder.add(bits, builder.add(odd, alike(2 ** (HALF - 1) - 1)))
    none = builder.or_(bits, alike(2**22))  # what is no number stays none
    bits = builder.select(builder.fcmp_unordered("uno", value, value), none, nearest)
    return builder.trunc(builder.lshr(bits, alike(HALF)), HALVES)


@intrinsic
def store(_: Any, array: Any, index: Any, vector: Any) -> Any:
    """There; to bfloat16 by rounding to the nearest, the even one of two (a number below 2^-126 may become 0)."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        if array.dtype == types.float32:
            builder.store(given[2], place(context, builder, signature, given, FLOATS), align=4)
        else:
            halves = rounded(context, builder, given[2])
            builder.store(halves, place(context, builder, signature, given, HALVES), align=2)
        return context.get_dummy_value()

    return types.none(array, types.intp, VECTOR), generate


@njit(forceinline=True)
def exp2(x):
    """2^x, for -126 <= x < 128: the fraction by a polynomial, the whole part added to its exponent."""
    whole = x + TO_INTEGER
    rest = x - (whole - TO_INTEGER)
    return times_power(C0 + rest * (C1 + rest * (C2 + rest * (C3 + rest * (C4 + rest * C5)))), whole)


@njit(forceinline=True)
def negative_exp2(biased):
    """-2^x within 3e-5 of it, where `biased` is x + BIAS, |x| < 127; two thirds of the work of `exp2`.

    Schraudolph's way (doi 10.1162/089976699300016467): the number's bits are those of the sum, but for a polynomial.
    """
    rest = fraction(biased) - WHOLE
    return as_exponent(biased + rest * (D1 + rest * (D2 + rest * (D3 + rest * D4))))


@njit(forceinline=True)
def silu(x):
    return quotient(x, ONE + exp2(smaller(larger(x * -LOG2_E, LOWEST), -LOWEST)))


@njit(forceinline=True)
def activated(pixel, scale, shift, c):
    """A pixel's channels from c on, normalised before."""
    return silu(load(pixel, c) * load(scale, c) + load(shift, c))


# --- kernels ---


@njit(forceinline=True)
def eight(rows):
    """The first vectors of eight rows."""
    return (
        load(rows[0], 0), load(rows[1], 0), load(rows[2], 0), load(rows[3], 0),
        load(rows[4], 0), load(rows[5], 0), load(rows[6], 0), load(rows[7], 0),
    )  # fmt: skip


@njit(forceinline=True)
def weight(q, pair):
    """Of a key for LANES queries, all weights negative; two short sums, of which neither waits for the other."""
    return negative_exp2(
        (BIAS + q[0] * pair[0] + q[1] * pair[1] + q[2] * pair[2] + q[3] * pair[3])
        + (q[4] * pair[4] + q[5] * pair[5] + q[6] * pair[6] + q[7] * pair[7])
    )


@njit(forceinline=True)
def gathered(sums, w, pair):
    """The sums of weighted values and of the weights, with those of one key and its value."""
    return (
        sums[0] + w * pair[8], sums[1] + w * pair[9], sums[2] + w * pair[10], sums[3] + w * pair[11],
        sums[4] + w * pair[12], sums[5] + w * pair[13], sums[6] + w * pair[14], sums[7] + w * pair[15], sums[8] + w,
    )  # fmt: skip


@kernel("void(f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,:,::1])")
def attend(queries, keys, values, answers):
    """[heads, 8, Q] and twice [heads, 8, K] -> [heads, 8, Q]; weights 2^(query · key), where |query · key| <= 100.

    LANES queries at a time; first the weights of some keys, four of which do not wait for each other, then the sums.
    """
    heads, _, count = queries.shape
    many = keys.shape[2]
    pairs = np.empty((many, 16), np.float32)
    weights = np.empty((KEYS, LANES), np.float32)
    some, sums = np.zeros((8, LANES), np.float32), np.empty((9, LANES), np.float32)
    for head in range(heads):
        for number in range(8):
            for i in range(many):
                pairs[i, number] = keys[head, number, i]
                pairs[i, 8 + number] = values[head, number, i]
        for begin in range(0, count, LANES):
            end = min(begin + LANES, count)
            some[:, : end - begin] = queries[head, :, begin:end]
            q = eight(some)
            none = q[0] * ZERO
            sums[:] = 0
            for first in range(0, many, KEYS):
                these = pairs[first : first + KEYS]
                fours = len(these) // 4 * 4
                for i in range(0, fours, 4):
                    a, b, c, d = these[i : i + 4]
                    for other, each in enumerate((weight(q, a), weight(q, b), weight(q, c), weight(q, d))):
                        store(weights[i + other], 0, each)
                for i in range(fours, len(these)):
                    store(weights[i], 0, weight(q, these[i]))
                found = (none, none, none, none, none, none, none, none, none)
                for i in range(len(these)):
                    found = gathered(found, load(weights[i], 0), these[i])
                for number, each in enumerate(found):
                    store(sums[number], 0, load(sums[number], 0) + each)
            for number in range(8):
                for i in range(begin, end):
                    answers[head, number, i] = sums[number, i - begin] / sums[8, i - begin]


READ = "void({0}[:,:,::1], f4[::1], f4[::1], i8, i8, {0}[:,:,::1])"


@kernel([READ.format("f4"), READ.format("i2")])
def activate(rows, scale, shift, top, offset, target):
    """Rows of [H, W, C] from `top` on, normalised and activated, and zero beyond the picture.

    scale, shift: [C]; target: [rows, W + 2, C'], from channel `offset` on.
    """
    height, width, channels = rows.shape
    for y in range(target.shape[0]):
        for x in range(width + 2):
            pixel = target[y, x]
            if 0 <= top + y < height and 0 < x <= width:
                source = rows[top + y, x - 1]
                for c in range(0, channels, LANES):
                    store(pixel, offset + c, activated(source, scale, shift, c))
            else:
                pixel[offset : offset + channels] = 0


@njit(forceinline=True)
def at_points(x0, x1, x2, x3, x4, x5):
    """Six pixels as a polynomial, taken at Winograd's six points."""
    return (
        FOUR * x0 - FIVE * x2 + x4,
        (x3 + x4) - FOUR * (x1 + x2),
        (x4 - x3) + FOUR * (x1 - x2),
        (x4 - x2) + TWO * (x3 - x1),
        (x4 - x2) - TWO * (x3 - x1),
        FOUR * x1 - FIVE * x3 + x5,
    )


@njit(forceinline=True)
def of_points(x0, x1, x2, x3, x4, x5):
    """Four pixels, from the six points of a product of polynomials."""
    return (
        x0 + (x1 + x2) + (x3 + x4),
        (x1 - x2) + TWO * (x3 - x4),
        (x1 + x2) + FOUR * (x3 + x4),
        (x1 - x2) + EIGHT * (x3 - x4) + x5,
    )


@kernel("void(f4[:,:,::1], f4[::1], f4[::1], i8, i8, i8, i8, f4[:,::1])")
def into_tiles(rows, scale, shift, top, left, down, across, factors):
    """Factors of `down` · `across` tiles of a map that is normalised and activated first.

    rows: [H, W, C]; scale, shift: [C]; top: the first row; left: the first tile; factors: [POINTS, tiles · C].
    """
    height, width, channels = rows.shape
    block = max(1, BLOCK // channels)
    lines = np.zeros((REACH, TILE, (block + 1) * channels), np.float32)
    turned = np.zeros((REACH, TILE, (block + 1) * channels), np.float32)
    for first in range(0, across, block):
        count = min(block, across - first)
        size = count * channels
        for tile_row in range(down):
            y0 = top + tile_row * TILE - 1
            for y in range(y0 if tile_row == 0 else y0 + 2, y0 + REACH):
                line = lines[(y + 1) % REACH]
                for column in range(count * TILE + 2):
                    x = (left + first) * TILE + column - 1
                    pixels, begin = line[column % TILE], column // TILE * channels
                    if 0 <= y < height and 0 <= x < width:
                        source = rows[y, x]
                        for channel in range(0, channels, LANES):
                            store(pixels, begin + channel, activated(source, scale, shift, channel))
                    else:
                        pixels[begin : begin + channels] = 0
            l0, l1, l2 = lines[(y0 + 1) % REACH], lines[(y0 + 2) % REACH], lines[(y0 + 3) % REACH]
            l3, l4, l5 = lines[(y0 + 4) % REACH], lines[(y0 + 5) % REACH], lines[(y0 + 6) % REACH]
            for column in range(TILE):
                a, b, c, d, e, f = l0[column], l1[column], l2[column], l3[column], l4[column], l5[column]
                for i in range(0, size + (column < 2) * channels, LANES):
                    found = at_points(load(a, i), load(b, i), load(c, i), load(d, i), load(e, i), load(f, i))
                    for point, each in enumerate(found):
                        store(turned[point, column], i, each)
            begin = (tile_row * across + first) * channels
            for point in range(REACH):
                a, b, c, d = turned[point]
                for i in range(0, size, LANES):
                    e, f = load(a, channels + i), load(b, channels + i)
                    found = at_points(load(a, i), load(b, i), load(c, i), load(d, i), e, f)
                    for other, each in enumerate(found):
                        store(factors[REACH * point + other], begin + i, each)


@kernel("void(f4[:,::1], f4[::1], i8, i8, f4[:,:,::1])")
def out_of_tiles(products, bias, left, across, rows):
    """Products [POINTS, tiles · C] to as many rows of tiles as [H, W, C] has, from tile `left` on, the bias added."""
    height, width, channels = rows.shape
    down = (height + TILE - 1) // TILE
    block = max(1, BLOCK // channels)
    turned = np.empty((TILE, REACH, block * channels), np.float32)
    for first in range(0, across, block):
        count = min(block, across - first)
        for tile_row in range(down):
            begin = (tile_row * across + first) * channels
            for point in range(REACH):
                a, b, c = products[point], products[REACH + point], products[2 * REACH + point]
                d, e, f = products[3 * REACH + point], products[4 * REACH + point], products[5 * REACH + point]
                for i in range(0, count * channels, LANES):
                    j = begin + i
                    found = of_points(load(a, j), load(b, j), load(c, j), load(d, j), load(e, j), load(f, j))
                    for pixel, each in enumerate(found):
                        store(turned[pixel, point], i, each)
            for y in range(min(TILE, height - tile_row * TILE)):
                row = rows[tile_row * TILE + y]
                a, b, c, d, e, f = turned[y]
                for tile in range(count):
                    x0 = (left + first + tile) * TILE
                    for channel in range(0, channels, LANES):
                        i = tile * channels + channel
                        found = of_points(load(a, i), load(b, i), load(c, i), load(d, i), load(e, i), load(f, i))
                        for pixel, each in enumerate(found):
                            if x0 + pixel < width:
                                store(row[x0 + pixel], channel, each + load(bias, channel))


@njit(forceinline=True)
def of_both(source, beside, y, x, c):
    """Their sum at one place, or what `source` has there."""
    value = load(source[y, x], c)
    return value + load(beside[y, x], c) if beside.size else value


SETTLE = "void({0}[:,:,::1], {0}[:,:,:], {0}[:,:,::1], i8, f8[:,::1])"


@kernel([SETTLE.format("f4"), SETTLE.format("i2")])
def settle(source, beside, target, offset, moments):
    """[H, W, c], and what is beside it if that is not empty, into [H, W, C] from channel `offset` on.

    The mean and variance of what is written, into [2, C], float64.
    """
    height, width, channels = source.shape
    pivots, sums, squares = np.empty((3, channels), np.float32)
    total = np.zeros((2, channels), np.float64)
    for c in range(0, channels, LANES):
        store(pivots, c, of_both(source, beside, 0, 0, c))
    for y in range(height):
        sums[:] = 0
        squares[:] = 0
        for x in range(width):
            pixel = target[y, x]
            for c in range(0, channels, LANES):
                value = of_both(source, beside, y, x, c)
                store(pixel, offset + c, value)
                value = value - load(pivots, c)
                store(sums, c, load(sums, c) + value)
                store(squares, c, load(squares, c) + value * value)
        for c in range(channels):
            total[0, c] += sums[c]
            total[1, c] += squares[c]
    for c in range(channels):
        mean = total[0, c] / (height * width)
        moments[0, offset + c] = pivots[c] + mean
        moments[1, offset + c] = total[1, c] / (height * width) - mean * mean
