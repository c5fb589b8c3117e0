# mypy: disable-error-code="no-untyped-call,import-untyped"
"""LLVM code for vectors of the host's register width: arithmetic, storage dtypes, rounding."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import config
from numba.core.codegen import get_host_cpu_features

_GIVEN = config.CPU_FEATURES  # type: ignore[attr-defined]
_FEATURES = (get_host_cpu_features() if _GIVEN is None else _GIVEN).split(",")
"""Of what Numba compiles for, which NUMBA_CPU_NAME and NUMBA_CPU_FEATURES may make less."""
VECTOR_BYTES = 64 if "+avx512f" in _FEATURES else 32 if "+avx" in _FEATURES else 16
HALVES = "+f16c" in _FEATURES
"""Whether the machine converts float16 itself."""
LOG_RADIX = 3 if VECTOR_BYTES == 32 else 4
"""A radix-r butterfly keeps r vectors in registers: AVX has 16, AVX-512 and NEON 32."""

FLOAT64, FLOAT32, BFLOAT16, FLOAT16 = range(4)
ITEMS = 8, 4, 2, 2
"""Bytes of an element of each."""

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F32, F64 = ir.FloatType(), ir.DoubleType()


class Vector:
    """Emits operations on vectors of ``lanes`` elements of the compute type."""

    def __init__(self, builder: ir.IRBuilder, one: types.Float, lanes: int = 0) -> None:
        self.builder = builder
        self.element = F64 if one == types.float64 else F32
        self.size = 8 if one == types.float64 else 4
        self.lanes = lanes or VECTOR_BYTES // self.size

    def type(self, element: ir.Type) -> ir.VectorType:
        return ir.VectorType(element, self.lanes)

    def splat(self, value: Any, element: ir.Type | None = None) -> ir.Value:
        kind = self.type(element or self.element)
        if not isinstance(value, ir.Value):
            return ir.Constant(kind, [value] * self.lanes)
        first = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
        mask = ir.Constant(self.type(I32), [0] * self.lanes)
        return self.builder.shuffle_vector(first, ir.Constant(kind, ir.Undefined), mask)

    def address(self, base: ir.Value, index: Any, step: Any) -> ir.Value:
        index, step = (v if isinstance(v, ir.Value) else I64(v) for v in (index, step))
        return self.builder.add(base, self.builder.mul(step, index))

    def load(self, address: ir.Value, element: ir.Type | None = None) -> ir.Value:
        kind = self.type(element or self.element)
        value = self.builder.load(self.builder.inttoptr(address, kind.as_pointer()))
        value.align = 1
        return value

    def store(self, value: ir.Value, address: ir.Value) -> None:
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        self.builder.store(value, pointer).align = 1

    def butterfly(self, v: list[ir.Value]) -> list[ir.Value]:
        """Sylvester's transform across the vectors of ``v``, in place."""
        half = 1
        while half < len(v):
            v = self.stage(v, half)
            half *= 2
        return v

    def stage(self, v: list[ir.Value], half: int) -> list[ir.Value]:
        """One stage of it, in place: sums and differences of vectors ``half`` apart."""
        for i in range(len(v)):
            if not i & half:
                a, b = v[i], v[i + half]
                v[i], v[i + half] = self.builder.fadd(a, b), self.builder.fsub(a, b)
        return v

    def across_lanes(self, v: ir.Value) -> ir.Value:
        """Sylvester's transform of the elements of one vector."""
        half = 1
        while half < self.lanes:
            mask = ir.Constant(self.type(I32), [i ^ half for i in range(self.lanes)])
            signs = ir.Constant(v.type, [-1.0 if i & half else 1.0 for i in range(self.lanes)])
            swapped = self.builder.shuffle_vector(v, ir.Constant(v.type, ir.Undefined), mask)
            flipped = self.builder.fmul(v, signs, flags=("contract",))
            v = self.builder.fadd(swapped, flipped, flags=("contract",))
            half *= 2
        return v

    def widen(self, address: ir.Value, kind: int) -> ir.Value:
        """Load a vector stored as ``kind`` and convert it, exactly, to the compute type."""
        b, bits = self.builder, self.type(I32)
        if kind == FLOAT64:
            v = self.load(address, F64)
            return v if self.element == F64 else b.fptrunc(v, self.type(F32))
        if kind == FLOAT32:
            v = self.load(address, F32)
        elif kind == FLOAT16 and HALVES:
            v = b.fpext(self.load(address, ir.HalfType()), self.type(F32))
        else:
            word = b.zext(self.load(address, I16), bits)
            if kind == BFLOAT16:
                v = b.bitcast(b.shl(word, self.splat(16, I32)), self.type(F32))
            else:
                v = self._from_half(word)
        return v if self.element == F32 else b.fpext(v, self.type(F64))

    def narrow(self, v: ir.Value, address: ir.Value, kind: int) -> None:
        """Round a vector to ``kind``, to nearest even, and store it."""
        b = self.builder
        if kind == FLOAT64:
            self.store(v if self.element == F64 else b.fpext(v, self.type(F64)), address)
            return
        if self.element == F64:
            v = b.fptrunc(v if kind == FLOAT32 else self._round_to_odd(v), self.type(F32))
        if kind == FLOAT32:
            self.store(v, address)
            return
        if kind == BFLOAT16:
            words = b.lshr(self._to_bfloat(v), self.splat(16, I32))
        elif HALVES:
            words = b.bitcast(b.fptrunc(v, self.type(ir.HalfType())), self.type(I16))
            self.store(words, address)
            return
        else:
            words = self._to_half(b.bitcast(v, self.type(I32)))
        self.store(b.trunc(words, self.type(I16)), address)

    def narrow_all(self, v: list[ir.Value], address: ir.Value, kind: int) -> None:
        """:meth:`narrow` of vectors side by side; pairs of bfloat16 are stored as one."""
        b, step = self.builder, self.lanes * ITEMS[kind]
        paired = kind == BFLOAT16 and self.element == F32 and len(v) % 2 == 0
        halves = ir.VectorType(I16, 2 * self.lanes)
        upper = ir.Constant(ir.VectorType(I32, 2 * self.lanes), [*range(1, 4 * self.lanes, 2)])
        for i in range(0, len(v), 1 + paired):
            place = self.address(address, i, step)
            if paired:
                words = (b.bitcast(self._to_bfloat(each), halves) for each in v[i : i + 2])
                self.store(b.shuffle_vector(*words, upper), place)
            else:
                self.narrow(v[i], place, kind)

    def _round_to_odd(self, v: ir.Value) -> ir.Value:
        # Of the 29 bits that float32 lacks only "was any set" may matter to a later rounding.
        b = self.builder
        word = b.bitcast(v, self.type(I64))
        lost = b.and_(word, self.splat((1 << 29) - 1, I64))
        sticky = b.zext(b.icmp_unsigned("!=", lost, self.splat(0, I64)), self.type(I64))
        kept = b.and_(word, self.splat(-1 << 29, I64))
        return b.bitcast(b.or_(kept, b.shl(sticky, self.splat(29, I64))), v.type)

    def _to_bfloat(self, v: ir.Value) -> ir.Value:
        """Words of float32 whose upper halves are ``v`` rounded."""
        b, c = self.builder, lambda value: self.splat(value, I32)
        word = b.bitcast(v, self.type(I32))
        even = b.and_(b.lshr(word, c(16)), c(1))
        rounded = b.add(word, b.add(even, c(0x7FFF)))
        return b.select(b.fcmp_unordered("uno", v, v), b.or_(word, c(0x400000)), rounded)

    def _to_half(self, word: ir.Value) -> ir.Value:
        b, c = self.builder, lambda value: self.splat(value, I32)
        magnitude = b.and_(word, c(0x7FFFFFFF))
        even = b.and_(b.lshr(magnitude, c(13)), c(1))
        normal = b.lshr(b.add(b.sub(magnitude, c(112 << 23)), b.add(even, c(0xFFF))), c(13))
        # Adding 0.5, whose ulp is the smallest subnormal of float16, rounds to a multiple of it.
        shifted = b.fadd(b.bitcast(magnitude, self.type(F32)), self.splat(0.5, F32))
        tiny = b.sub(b.bitcast(shifted, self.type(I32)), c(0x3F000000))
        result = b.select(b.icmp_unsigned("<", magnitude, c(113 << 23)), tiny, normal)
        result = b.select(b.icmp_unsigned(">=", magnitude, c(0x477FF000)), c(0x7C00), result)
        result = b.select(b.icmp_unsigned(">", magnitude, c(0x7F800000)), c(0x7E00), result)
        return b.or_(result, b.and_(b.lshr(word, c(16)), c(0x8000)))

    def _from_half(self, word: ir.Value) -> ir.Value:
        b, c = self.builder, lambda value: self.splat(value, I32)
        magnitude = b.shl(b.and_(word, c(0x7FFF)), c(13))
        scaled = b.fmul(b.bitcast(magnitude, self.type(F32)), self.splat(2.0**112, F32))
        special = b.icmp_unsigned(">=", magnitude, c(0x1F << 23))
        finite = b.bitcast(scaled, self.type(I32))
        result = b.select(special, b.or_(magnitude, c(0x7F800000)), finite)
        sign = b.shl(b.and_(word, c(0x8000)), c(16))
        return b.bitcast(b.or_(result, sign), self.type(F32))
