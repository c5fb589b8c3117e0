# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202
"""The innermost blocks of the CPU kernels, as Numba intrinsics that emit vector code.

Numba leaves vectorisation to a heuristic; these blocks say what they want. All addresses and steps
are in bytes; ``one`` is a number of the compute type, float32 or float64.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastrot.kernels._cpu_vectors import I8, I32, I64, VECTOR_BYTES, Vector

COLUMNS = 2
"""Vectors side by side in a dense factor."""
TABLES = 8
"""Tables of a dense factor that are in cache at once."""


def _literal(value: types.Type) -> int:
    return int(value.literal_value)


@intrinsic
def lanes_of(typing_context, one):
    """Elements in one vector."""

    def emit(context, builder, signature, args):
        return I64(Vector(builder, one).lanes)

    return types.int64(one), emit


@intrinsic
def address_of(typing_context, array):
    """The address of an array's data."""

    def emit(context, builder, signature, args):
        data = context.make_array(array)(context, builder, args[0]).data
        return builder.ptrtoint(data, I64)

    return types.int64(array), emit


@intrinsic(prefer_literal=True)
def widen(typing_context, src, dst, kind, factor, weights, lanes, one):
    """Store ``widen(src) · factor · weights`` for one vector of ``lanes`` (0: full) elements."""
    width = _literal(lanes)

    def emit(context, builder, signature, args):
        source, target, kind, factor, weights, *_ = args
        vector = Vector(builder, one, width)
        for value in range(4):
            with builder.if_then(builder.icmp_signed("==", kind, I64(value))):
                v = builder.fmul(vector.widen(source, value), vector.splat(factor))
                vector.store(builder.fmul(v, vector.load(weights)), target)

    return types.void(*[types.int64] * 3, one, types.int64, lanes, one), emit


@intrinsic(prefer_literal=True)
def narrow(typing_context, src, dst, kind, factor, weights, lanes, one):
    """Store ``round(src · factor · weights)`` for one vector of ``lanes`` (0: full) elements."""
    width = _literal(lanes)

    def emit(context, builder, signature, args):
        source, target, kind, factor, weights, *_ = args
        vector = Vector(builder, one, width)
        v = builder.fmul(vector.load(source), vector.splat(factor))
        v = builder.fmul(v, vector.load(weights))
        for value in range(4):
            with builder.if_then(builder.icmp_signed("==", kind, I64(value))):
                vector.narrow(v, target, value)

    return types.void(*[types.int64] * 3, one, types.int64, lanes, one), emit


@intrinsic
def butterfly(typing_context, base, step, radix, one):
    """H_radix across the vectors at ``base``, ``base + step``, … in place."""

    def emit(context, builder, signature, args):
        base, step, radix, _ = args
        vector = Vector(builder, one)
        for size in (2, 4, 8, 16):
            with builder.if_then(builder.icmp_signed("==", radix, I64(size))):
                places = [vector.address(base, i, step) for i in range(size)]
                values = vector.butterfly([vector.load(place) for place in places])
                for value, place in zip(values, places, strict=True):
                    vector.store(value, place)

    return types.void(*[types.int64] * 3, one), emit


@intrinsic
def chunk(typing_context, base, radix, one):
    """Transform of radix · lanes consecutive elements, in place."""

    def emit(context, builder, signature, args):
        base, radix, _ = args
        vector = Vector(builder, one)
        for size in (1, 2, 4, 8, 16):
            with builder.if_then(builder.icmp_signed("==", radix, I64(size))):
                places = [vector.address(base, i, VECTOR_BYTES) for i in range(size)]
                values = vector.butterfly([vector.load(place) for place in places])
                for value, place in zip(values, places, strict=True):
                    vector.store(vector.across_lanes(value), place)

    return types.void(types.int64, types.int64, one), emit


@intrinsic(prefer_literal=True)
def prefetch(typing_context, address, write):
    """Ask for the cache line at ``address``, which need not be mapped, to read or to write."""
    intent = _literal(write)

    def emit(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(prefetch, [pointer, I32(intent), I32(3), I32(1)])

    return types.void(types.int64, write), emit


@intrinsic
def copy_one(typing_context, src, dst, one):
    """Copy one element of a panel."""

    def emit(context, builder, signature, args):
        vector = Vector(builder, one, 1)
        vector.store(vector.load(args[0]), args[1])

    return types.void(types.int64, types.int64, one), emit


@intrinsic(prefer_literal=True)
def tabulate(typing_context, base, step, table, width, one):
    """All sixteen ±a ±b ±c ±d of four (columns of ``width`` vectors); bit i negates the i-th."""
    columns = _literal(width)

    def emit(context, builder, signature, args):
        base, step, table, *_ = args
        vector = Vector(builder, one)
        for column in range(columns):
            at = vector.address(base, column, VECTOR_BYTES)
            a, b, c, d = (vector.load(vector.address(at, i, step)) for i in range(4))
            first = builder.fadd(a, b), builder.fsub(a, b)
            second = builder.fadd(c, d), builder.fsub(c, d)
            for code in range(8):
                negate_b, negate_c, negate_d = code & 1, code >> 1 & 1, code >> 2 & 1
                join = builder.fsub if negate_c else builder.fadd
                value = join(first[negate_b], second[negate_c ^ negate_d])
                place = vector.address(table, 2 * code * COLUMNS + column, VECTOR_BYTES)
                mirror = vector.address(table, (15 - 2 * code) * COLUMNS + column, VECTOR_BYTES)
                vector.store(value, place)
                vector.store(builder.fneg(value), mirror)

    return types.void(*[types.int64] * 3, width, one), emit


@intrinsic(prefer_literal=True)
def accumulate(typing_context, table, codes, groups, src, dst, width, one):
    """``dst = src + Σ table[codes[g]]``; ``width`` vectors, ``groups`` codes of uint8."""
    columns = _literal(width)

    def emit(context, builder, signature, args):
        table, codes, groups, source, target, *_ = args
        vector = Vector(builder, one)
        places = [vector.address(source, i, VECTOR_BYTES) for i in range(columns)]
        sums = [cgutils.alloca_once_value(builder, vector.load(place)) for place in places]
        pointer = builder.inttoptr(codes, I8.as_pointer())
        with cgutils.for_range(builder, groups) as loop:
            code = builder.zext(builder.load(builder.gep(pointer, [loop.index])), I64)
            entry = vector.address(table, code, COLUMNS * VECTOR_BYTES)
            for i, total in enumerate(sums):
                value = vector.load(vector.address(entry, i, VECTOR_BYTES))
                builder.store(builder.fadd(builder.load(total), value), total)
        for i, total in enumerate(sums):
            vector.store(builder.load(total), vector.address(target, i, VECTOR_BYTES))

    return types.void(*[types.int64] * 5, width, one), emit
