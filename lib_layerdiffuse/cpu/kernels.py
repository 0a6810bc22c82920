"""Attention compiled by numba (Forge has it by facexlib), six times as fast as torch's where heads are this narrow.

Numbers are worked on as vectors of LANES: LLVM by itself often finds none, and on Intel's processors uses half their
width. All is in this one file, as numba's cache on disk notices only changes of a kernel's own file.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, models, overload, register_model

LANES = 16  # numbers of a vector: one register of AVX-512, two of AVX2, each read number serving both
KEYS = 64  # at once: their weights stay in the first cache, and a sum of a thousand float32 numbers would lose digits

ZERO = np.float32(0)
WHOLE = np.float32(256)  # from here to 512, a float32 number's lowest 15 bits are its fraction
BIAS = WHOLE + np.float32(127)  # of float32's exponents


def polynomial(function: Callable[[Any], Any], middle: float, degree: int) -> Any:
    """Its coefficients, for numbers up to 1/2 from the middle, through the zeros of Chebyshev's polynomial."""
    nodes = np.polynomial.chebyshev.chebpts1(degree + 1) / 2 + middle
    return np.polynomial.polynomial.polyfit(nodes, function(nodes), degree).astype(np.float32)


D1, D2, D3, D4 = polynomial(lambda x: (2.0**x - 1 - x) / x, 1 / 2, 3)  # times x within 8e-6


# --- vectors ---


class Vector(types.Type):
    """LANES float32 numbers, in a register."""

    def __init__(self) -> None:
        super().__init__("Vector")


VECTOR = Vector()
FLOATS, BITS = (ir.VectorType(of, LANES) for of in (ir.FloatType(), ir.IntType(32)))


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


def place(context: Any, builder: Any, signature: Any, given: Any) -> Any:
    """Where number `given[1]` of an array lies, as a pointer to a vector."""
    array = context.make_array(signature.args[0])(context, builder, given[0])
    return builder.bitcast(builder.gep(array.data, [given[1]]), FLOATS.as_pointer())


@intrinsic
def load(_: Any, array: Any, index: Any) -> Any:
    """LANES numbers from there on; the array is one line of memory."""

    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        return builder.load(place(context, builder, signature, given), align=4)

    return VECTOR(array, types.intp), generate


@intrinsic
def store(_: Any, array: Any, index: Any, vector: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        builder.store(given[2], place(context, builder, signature, given), align=4)
        return context.get_dummy_value()

    return types.none(array, types.intp, VECTOR), generate


@njit(forceinline=True)
def negative_exp2(biased):
    """-2^x within 3e-5 of it, where `biased` is x + BIAS, |x| < 127.

    Schraudolph's way (doi 10.1162/089976699300016467): the number's bits are those of the sum, but for a polynomial.
    """
    rest = fraction(biased) - WHOLE
    return as_exponent(biased + rest * (D1 + rest * (D2 + rest * (D3 + rest * D4))))


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


def attend(queries, keys, values, answers):
    """[heads, 8, Q] and twice [heads, 8, K] -> [heads, 8, Q]; weights 2^(query · key), where |query · key| <= 100.

    It holds no lock of Python's. LANES queries at a time; first the weights of some keys, four of which do not wait for
    each other, then the sums.
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


SIGNATURE = "void(f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,:,::1])"
OPTIONS = {"nogil": True, "error_model": "numpy"}


def compiled() -> tuple[Callable[..., None], bool]:
    """`attend` for this processor, and whether it can be kept on disk.

    That is where NUMBA_CACHE_DIR says, else beside this file, else where the user's caches are (numba's
    core/caching.py); numba raises RuntimeError where none of them can be written to.
    """
    try:
        return njit(SIGNATURE, cache=True, **OPTIONS)(attend), True
    except RuntimeError:
        return njit(SIGNATURE, **OPTIONS)(attend), False
