"""The epilogue of the fused kernels: a tile of float32 results becomes codes and scales.

:mod:`fastrot.kernels.formats` says what the formats mean. A tile holds ``TOKENS`` tokens, each of
``TOKEN_ROWS`` rows of ``COLUMNS`` elements, then padding, which holds zeros. It comes in R rows of
S pieces, each ``(P, Q)``; there is one row if there are several tokens.
"""

# Arguments of a kernel have Triton's types, not Python's.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from fastrot.kernels.formats import FORMATS, SMALLEST_AMAX

NONE = tl.constexpr(0)
INT8 = tl.constexpr(1)
FP8 = tl.constexpr(2)
INT4 = tl.constexpr(3)
MXFP4 = tl.constexpr(4)
NVFP4 = tl.constexpr(5)
KINDS = {None: 0, "int8": 1, "fp8": 2, "int4": 3, "mxfp4": 4, "nvfp4": 5}
LARGEST = tl.constexpr((0.0, *(form.largest for form in FORMATS.values())))
TINY = tl.constexpr(SMALLEST_AMAX)


@triton.jit
def _drop_bits(magnitude, DROPPED: tl.constexpr):
    """The bits of a nonnegative float32 without the lowest DROPPED, to nearest even."""
    bits = magnitude.to(tl.int32, bitcast=True)
    return (bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)) >> DROPPED


# A float32 scaled so that the exponents coincide, and subnormal where the short format is, has the
# code as its upper bits.


@triton.jit
def _e2m1(v):
    """Codes of two exponent bits and one mantissa bit."""
    code = tl.minimum(_drop_bits(tl.abs(v) * 1.1754943508222875e-38, 22), 7)
    return code | (v.to(tl.int32, bitcast=True) >> 28) & 8


@triton.jit
def _e4m3(v):
    """Codes of four exponent bits and three mantissa bits."""
    code = tl.minimum(_drop_bits(tl.abs(v) * 7.52316384526264e-37, 20), 126)
    return code | (v.to(tl.int32, bitcast=True) >> 24) & 128


@triton.jit
def _round(v):
    """The nearest integer, to even, of magnitude below 2^22: it is left in the low bits."""
    return (v + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _scale(amax, world, KIND: tl.constexpr):
    """The scale as stored, and the factor that takes values to codes."""
    if KIND == MXFP4:
        field = tl.maximum((amax.to(tl.int32, bitcast=True) >> 23) - 2, 0)
        # 2^(127 - field) for a factor, whose own exponent field is 254 - field.
        return field.to(tl.uint8), ((254 - field) << 23).to(tl.float32, bitcast=True)
    elif KIND == NVFP4:
        code = _e4m3(amax * (1 / 6) * world)
        step = (code << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36
        return code.to(tl.uint8), tl.where(code > 0, world / tl.maximum(step, TINY), 0.0)
    else:
        amax = tl.maximum(amax, TINY)
        return amax * (1 / LARGEST[KIND]), LARGEST[KIND] / amax


@triton.jit
def _encode(v, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """One code in a byte: int8 and fp8."""
    if KIND == INT8:
        return _round(v).to(tl.int8)
    elif NATIVE:
        return v.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        return _e4m3(v).to(tl.uint8)


@triton.jit
def _encode_pair(low, high, KIND: tl.constexpr, NATIVE: tl.constexpr):
    """Two codes in a byte: int4 and e2m1."""
    if KIND == INT4:
        return (_round(low) & 15 | _round(high) << 4).to(tl.uint8)
    elif NATIVE:
        return tl.inline_asm_elementwise(
            "{ .reg .b8 b; cvt.rn.satfinite.e2m1x2.f32 b, $2, $1; mov.b32 $0, {b, 0, 0, 0}; }",
            "=r,r,r",
            [low, high],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        ).to(tl.uint8)
    else:
        return (_e2m1(low) | _e2m1(high) << 4).to(tl.uint8)


@triton.jit
def _amax_of_tokens(
    pieces,
    COUNT: tl.constexpr,
    TOKEN_ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    P: tl.constexpr,
):
    """The largest magnitude of the token of every row of a piece, ``(P,)``."""
    largest = tl.abs(pieces[0])
    for n in tl.static_range(1, COUNT):
        largest = tl.maximum(largest, tl.abs(pieces[n]))
    rows = tl.max(largest, axis=1)
    if TOKENS == 1:
        return tl.zeros_like(rows) + tl.max(rows, axis=0)
    elif TOKEN_ROWS == 1:
        return rows
    else:
        token = tl.arange(0, P) // TOKEN_ROWS
        same = token[:, None] == token[None, :]
        return tl.max(tl.where(same, rows[None, :], 0.0), axis=1)


@triton.jit
def _scale_offset(token, group, GROUPS: tl.constexpr, BLOCKED: tl.constexpr):
    if BLOCKED:
        block = token // 128 * ((GROUPS + 3) // 4) + group // 4
        return block * 512 + token % 32 * 16 + token % 128 // 32 * 4 + group % 4
    else:
        return token * GROUPS + group


@triton.jit
def store_piece(
    y,
    factor,
    scale,
    out,
    scales,
    world,
    first,
    tokens,
    i,
    column: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKED: tl.constexpr,
    NATIVE: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKEN_ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Quantise ``y · scale``, rows i, ``(P, 1)``, and Q columns from ``column`` on.

    Where the scale belongs to a token, ``factor`` makes codes of it. Else as :func:`store_tile`.
    """
    token = i // TOKEN_ROWS
    row = i - token * TOKEN_ROWS
    inside = (i < TOKENS * TOKEN_ROWS) & (token < tokens - first)
    SIZE: tl.constexpr = TOKEN_ROWS * COLUMNS
    PER_BYTE: tl.constexpr = 2 if KIND >= INT4 else 1
    first = tl.cast(first, tl.int64)
    if KIND == NONE:
        codes = (y * scale).to(out.dtype.element_ty)
    else:
        if GROUP == 0:
            v = y * (factor * scale)
        else:
            groups = tl.reshape(y, (P, Q // GROUP, GROUP))
            stored, factor = _scale(tl.max(tl.abs(groups), axis=2) * scale, world, KIND)
            g = column // GROUP + tl.arange(0, Q // GROUP)[None, :]
            group = row * (COLUMNS // GROUP) + g
            place = _scale_offset(first + token, group, SIZE // GROUP, BLOCKED)
            tl.store(scales + place, stored, mask=inside & (g < COLUMNS // GROUP))
            v = tl.reshape(groups * (factor * scale)[:, :, None], (P, Q))
        if PER_BYTE == 1:
            codes = _encode(v, KIND, NATIVE)
        else:
            low, high = tl.split(tl.reshape(v, (P, Q // 2, 2)))
            codes = _encode_pair(low, high, KIND, NATIVE)
    j = column // PER_BYTE + tl.arange(0, Q // PER_BYTE)[None, :]
    offset = (token * SIZE + row * COLUMNS) // PER_BYTE + j
    target = out + first * (SIZE // PER_BYTE) + offset
    tl.store(target, codes, mask=inside & (j < COLUMNS // PER_BYTE))


@triton.jit
def store_tile(
    pieces,
    scale,
    out,
    scales,
    world,
    first,
    tokens,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCKED: tl.constexpr,
    NATIVE: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    Q: tl.constexpr,
    S: tl.constexpr,
    COLUMNS: tl.constexpr,
    TOKEN_ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Quantise ``pieces · scale``, the tokens from ``first`` on; round them if KIND is NONE.

    ``scale`` is ``(P, 1)``. ``out`` points to the bytes of the codes, or to elements of the
    result's dtype; it is contiguous. COLUMNS and Q are multiples of GROUP.
    """
    p = tl.arange(0, P)[:, None]
    factor = 1.0
    if KIND != NONE and GROUP == 0:
        amax = _amax_of_tokens(pieces, R * S, TOKEN_ROWS, TOKENS, P)[:, None] * scale
        stored, factor = _scale(amax, world, KIND)
        token = p // TOKEN_ROWS
        inside = (p < TOKENS * TOKEN_ROWS) & (token < tokens - first)
        target = scales + tl.cast(first, tl.int64) + token
        tl.store(target, stored, mask=inside & (p - token * TOKEN_ROWS == 0))
    for n in tl.static_range(R * S):
        store_piece(
            pieces[n], factor, scale, out, scales, world, first, tokens, n // S * P + p, n % S * Q,
            KIND, GROUP, BLOCKED, NATIVE, P, Q, COLUMNS, TOKEN_ROWS, TOKENS,
        )  # fmt: skip
