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

from fastrot.hadamard import base_matrix
from fastrot.kernels._cpu_vectors import I16, I32, I64, ITEMS, LOG_RADIX, VECTOR_BYTES, Vector

COLUMNS = 2
"""Vectors side by side in a dense factor."""
TABLES = 8
"""Tables of a dense factor that are in cache at once."""
CODE_BYTES, CODE_UNIT = 2, 8
"""Of an entry's place in the tables: bytes of the number, and what it counts."""


def _literal(value: types.Type) -> int:
    return int(value.literal_value)


def _choose(builder, value, cases, emit):
    """Run ``emit(case)`` for the one of the constants that ``value`` is; it is no other."""
    blocks = [builder.append_basic_block() for _ in cases]
    end = builder.append_basic_block()
    switch = builder.switch(value, blocks[-1])
    for case, block in zip(cases, blocks, strict=True):
        if block is not blocks[-1]:
            switch.add_case(I64(case), block)
        builder.position_at_end(block)
        emit(case)
        builder.branch(end)
    builder.position_at_end(end)


@intrinsic
def lanes_of(typing_context, one):
    """Elements in one vector."""

    def emit(context, builder, signature, args):
        return I64(Vector(builder, one).lanes)

    return types.int64(one), emit


@intrinsic
def word(typing_context, base, index):
    """The int64 at this index behind an address."""

    def emit(context, builder, signature, args):
        place = builder.inttoptr(args[0], I64.as_pointer())
        return builder.load(builder.gep(place, [args[1]]))

    return types.int64(types.int64, types.int64), emit


@intrinsic
def number(typing_context, base, index, one):
    """The number of the type of ``one`` at this index behind an address."""

    def emit(context, builder, signature, args):
        place = builder.inttoptr(args[0], context.get_value_type(one).as_pointer())
        return builder.load(builder.gep(place, [args[1]]))

    return one(types.int64, types.int64, one), emit


@intrinsic
def take(typing_context, address, count):
    """Add to the int64 at an address that threads share; what it was before."""

    def emit(context, builder, signature, args):
        place = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", place, args[1], "monotonic")

    return types.int64(types.int64, types.int64), emit


@intrinsic(prefer_literal=True)
def widen(typing_context, src, dst, kind, factor, weights, step, count, one):
    """Store ``widen(src) · factor · weights`` for ``count`` vectors (0: one element).

    The vectors of weights lie ``step`` apart.
    """
    many = _literal(count)

    def emit(context, builder, signature, args):
        source, target, kind, factor, weights, step, *_ = args
        vector = Vector(builder, one, 0 if many else 1)
        splat = vector.splat(factor)

        def load(kind):
            for i in range(max(many, 1)):
                v = vector.widen(vector.address(source, i, vector.lanes * ITEMS[kind]), kind)
                weight = vector.load(vector.address(weights, i, step))
                v = builder.fmul(builder.fmul(v, splat), weight)
                vector.store(v, vector.address(target, i, VECTOR_BYTES))

        _choose(builder, kind, range(4), load)

    return types.void(*[types.int64] * 3, one, types.int64, types.int64, count, one), emit


@intrinsic(prefer_literal=True)
def narrow(typing_context, src, dst, kind, factor, weights, step, count, one):
    """Store ``round(src · factor · weights)`` likewise."""
    many = _literal(count)

    def emit(context, builder, signature, args):
        source, target, kind, factor, weights, step, *_ = args
        vector = Vector(builder, one, 0 if many else 1)
        splat = vector.splat(factor)
        values = []
        for i in range(max(many, 1)):
            v = vector.load(vector.address(source, i, VECTOR_BYTES))
            weight = vector.load(vector.address(weights, i, step))
            values.append(builder.fmul(builder.fmul(v, splat), weight))
        _choose(builder, kind, range(4), lambda kind: vector.narrow_all(values, target, kind))

    return types.void(*[types.int64] * 3, one, types.int64, types.int64, count, one), emit


@intrinsic(prefer_literal=True)
def butterfly(typing_context, base, step, radix, factor, scaled, one):
    """H_radix across the vectors at ``base``, ``base + step``, … in place.

    With ``scaled`` = 1 the results are multiplied by ``factor``.
    """
    last = _literal(scaled)

    def emit(context, builder, signature, args):
        base, step, radix, factor, *_ = args
        vector = Vector(builder, one)

        def work(size):
            places = [vector.address(base, i, step) for i in range(size)]
            values = vector.butterfly([vector.load(place) for place in places])
            for value, place in zip(values, places, strict=True):
                vector.store(builder.fmul(value, vector.splat(factor)) if last else value, place)

        _choose(builder, radix, [1 << bits for bits in range(1, LOG_RADIX + 1)], work)

    return types.void(*[types.int64] * 3, one, scaled, one), emit


def _slots(builder, vector, count):
    """Places for vectors that the compiler keeps in registers; not zeroed, unlike Numba's."""
    with builder.goto_entry_block():
        return [builder.alloca(vector.type(vector.element)) for _ in range(count)]


def _scale(builder, vector, slots, numbers, step):
    """Multiply by the numbers at an address, ``step`` apart, unless that is null."""
    with builder.if_then(builder.icmp_signed("!=", numbers, I64(0))):
        for i, slot in enumerate(slots):
            place = vector.address(numbers, i, step)
            number = builder.load(builder.inttoptr(place, vector.element.as_pointer()))
            builder.store(builder.fmul(builder.load(slot), vector.splat(number)), slot)


def _weigh(builder, vector, slots, weights, step):
    """Multiply by the vectors at ``weights``, ``step`` apart, unless that is null."""
    with builder.if_then(builder.icmp_signed("!=", weights, I64(0))):
        for i, slot in enumerate(slots):
            weight = vector.load(vector.address(weights, i, step))
            builder.store(builder.fmul(builder.load(slot), weight), slot)


@intrinsic(prefer_literal=True)
def cross(
    typing_context, src, step, kind, cols, cols_step, rows, rows_step, dst, dst_step, dst_kind,
    new_cols, new_cols_step, new_rows, new_rows_step, factor, radix, one,
):  # fmt: skip
    """H_radix across the vectors at ``src``, ``step`` apart, rounded to those at ``dst``.

    Before, they are multiplied by the vectors of weights at ``cols``, ``cols_step`` apart, and by
    the numbers at ``rows``, ``rows_step`` apart; afterwards likewise, and by ``factor``. Null is no
    weights. A radix of one is a copy.
    """

    def emit(context, builder, signature, args):
        source, step, kind, cols, cols_step, rows, rows_step, *after = args
        target, target_step, target_kind, new_cols, new_cols_step, *last = after
        new_rows, new_rows_step, factor, radix, _ = last
        vector = Vector(builder, one)

        def work(count):
            slots = _slots(builder, vector, count)

            def load(kind):
                for i, slot in enumerate(slots):
                    builder.store(vector.widen(vector.address(source, i, step), kind), slot)

            def save(kind):
                for i, slot in enumerate(slots):
                    place = vector.address(target, i, target_step)
                    vector.narrow(builder.load(slot), place, kind)

            _choose(builder, kind, range(4), load)
            _scale(builder, vector, slots, rows, rows_step)
            _weigh(builder, vector, slots, cols, cols_step)
            values = vector.butterfly([builder.load(slot) for slot in slots])
            for slot, value in zip(slots, values, strict=True):
                builder.store(builder.fmul(value, vector.splat(factor)), slot)
            _scale(builder, vector, slots, new_rows, new_rows_step)
            _weigh(builder, vector, slots, new_cols, new_cols_step)
            _choose(builder, target_kind, range(4), save)

        _choose(builder, radix, [1 << bits for bits in range(LOG_RADIX + 1)], work)

    words = [types.int64] * 14
    return types.void(*words, one, types.int64, one), emit


@intrinsic(prefer_literal=True)
def finish(typing_context, src, kind, before, dst, dst_kind, after, factor, radix, full, one):
    """Transform radix · lanes consecutive elements, or as many as are whole in 2^LOG_RADIX vectors.

    ``dst = round(H (src · before) · factor · after)``. Null is no weights. With ``full`` = 1 it is
    2^LOG_RADIX vectors, whatever the radix, else ``radix`` of them.
    """
    whole = _literal(full)

    def emit(context, builder, signature, args):
        source, kind, before, target, target_kind, after, factor, radix, *_ = args
        vector = Vector(builder, one)
        splat = vector.splat(factor)

        def work(count):
            slots = _slots(builder, vector, count)

            def load(kind):
                for i, slot in enumerate(slots):
                    place = vector.address(source, i, vector.lanes * ITEMS[kind])
                    builder.store(vector.widen(place, kind), slot)

            def stage(half):
                values = vector.stage([builder.load(slot) for slot in slots], half)
                for slot, value in zip(slots, values, strict=True):
                    builder.store(value, slot)

            def save(kind):
                values = [builder.load(slot) for slot in slots]
                vector.narrow_all(values, target, kind)

            _choose(builder, kind, range(4), load)
            _weigh(builder, vector, slots, before, VECTOR_BYTES)
            half = 1
            while half < count:
                if whole:
                    with builder.if_then(builder.icmp_signed("<", I64(half), radix)):
                        stage(half)
                else:
                    stage(half)
                half *= 2
            for slot in slots:
                value = vector.across_lanes(builder.load(slot))
                builder.store(builder.fmul(value, splat), slot)
            _weigh(builder, vector, slots, after, VECTOR_BYTES)
            _choose(builder, target_kind, range(4), save)

        if whole:
            work(1 << LOG_RADIX)
        else:
            _choose(builder, radix, [1 << bits for bits in range(LOG_RADIX)], work)

    return types.void(*[types.int64] * 6, one, types.int64, full, one), emit


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


FIXED = 12, 20, 28, 36
"""The least orders of dense factors, which have code of their own, as they are and transposed."""


@intrinsic
def fixed(typing_context, base, step, choice, one):
    """A ±1 matrix across vectors ``step`` apart, in place, without tables.

    ``choice`` is twice the place of its order in ``FIXED``, and one more if it is transposed. Of
    four inputs there are eight sums but for their signs; every output adds or subtracts one of
    them. As many outputs as leave registers for the sums are made at a time.
    """

    def emit(context, builder, signature, args):
        base, step, choice, _ = args
        vector = Vector(builder, one)

        def work(case):
            m, transposed = FIXED[case // 2], case % 2
            signs = base_matrix(m) if transposed else base_matrix(m).T
            places = [vector.address(base, i, step) for i in range(m)]
            at_once = m // 2 if LOG_RADIX == 4 else m // 4
            results = []
            for first in range(0, m, at_once):
                sums = [None] * at_once
                for g in range(0, m, 4):
                    a, b, c, d = (vector.load(place) for place in places[g : g + 4])
                    ab = builder.fadd(a, b), builder.fsub(a, b)
                    cd = builder.fadd(c, d), builder.fsub(c, d)
                    eight = {}
                    for i in range(at_once):
                        row = signs[first + i, g : g + 4]
                        key = tuple(row * row[0])
                        if key not in eight:
                            join = builder.fadd if key[2] > 0 else builder.fsub
                            eight[key] = join(ab[int(key[1] < 0)], cd[int(key[2] * key[3] < 0)])
                        value = eight[key]
                        if sums[i] is None:
                            sums[i] = value if row[0] > 0 else builder.fneg(value)
                        else:
                            sums[i] = (builder.fadd if row[0] > 0 else builder.fsub)(sums[i], value)
                results += sums
            for value, place in zip(results, places, strict=True):
                vector.store(value, place)

        _choose(builder, choice, range(2 * len(FIXED)), work)

    return types.void(*[types.int64] * 3, one), emit


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
    """``dst = src + Σ table[codes[g]]``; ``width`` vectors, ``groups`` codes of uint16."""
    columns = _literal(width)

    def emit(context, builder, signature, args):
        table, codes, groups, source, target, *_ = args
        vector = Vector(builder, one)
        places = [vector.address(source, i, VECTOR_BYTES) for i in range(columns)]
        sums = [cgutils.alloca_once_value(builder, vector.load(place)) for place in places]
        pointer = builder.inttoptr(codes, I16.as_pointer())

        def add(index):
            code = builder.zext(builder.load(builder.gep(pointer, [index])), I64)
            entry = vector.address(table, code, CODE_UNIT)
            for i, total in enumerate(sums):
                value = vector.load(vector.address(entry, i, VECTOR_BYTES))
                builder.store(builder.fadd(builder.load(total), value), total)

        many = builder.sdiv(groups, I64(TABLES))
        with cgutils.for_range(builder, many) as loop:
            for i in range(TABLES):
                add(builder.add(builder.mul(loop.index, I64(TABLES)), I64(i)))
        done = builder.mul(many, I64(TABLES))
        with cgutils.for_range(builder, builder.sub(groups, done)) as loop:
            add(builder.add(done, loop.index))
        for i, total in enumerate(sums):
            vector.store(builder.load(total), vector.address(target, i, VECTOR_BYTES))

    return types.void(*[types.int64] * 5, width, one), emit
