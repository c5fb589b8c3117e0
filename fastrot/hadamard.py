"""Hadamard matrices, constructed: exact integers of every order ``m · 2^k`` that fastrot knows.

A Hadamard matrix H of order n has entries ±1 and ``H Hᵀ = n I``. Powers of two come from Sylvester
(1867), other base orders from Paley ("On orthogonal matrices", 1933; both constructions, over
prime and prime-power fields) and Williamson ("Hadamard's determinant theorem and the sum of four
squares", 1944). Kronecker products of Hadamard matrices are Hadamard matrices.
"""

from collections.abc import Iterator
from functools import lru_cache, reduce
from math import isqrt, prod

import numpy as np
import numpy.typing as npt

from fastrot.errors import RotationError

Signs = npt.NDArray[np.int8]

MAX_BASE = 4096
"""Larger base orders are not considered: a dense factor of that size is no fast transform."""

# The first halves of the symmetric sequences A, B, C, D, for orders that no Paley matrix has.
WILLIAMSON = {
    23: ("++-+-++-+--+", "+---+++++++-", "+-+++++---+-", "+--++---+-+-"),
    29: ("++-+++--+-++---", "+++-+---++++-++", "+--+++--++-+---", "++-+-+++-++-+--"),
    39: (
        "++--+++-+--++-+-----",
        "+---+---+-++-++----+",
        "+---+--++++----+-+-+",
        "+-++------++--+-+-++",
    ),
    43: (
        "+++++-++----+-++--++-+",
        "+++---++--+-+-+-++----",
        "++-+-++++-+--+--+++--+",
        "+-++-----++++-+-+++-++",
    ),
}


class HadamardSizeError(RotationError):
    """fastrot knows no Hadamard matrix of this order."""


def factors(n: int) -> tuple[tuple[int, ...], int]:
    """Split an order: ``n = m₁ ⋯ m_r · 2^k``, ``H_n = M₁ ⊗ … ⊗ M_r ⊗ H_{2^k}``.

    This rule *is* the rotation: two versions that split an order differently are incompatible, so
    it is a promise. Let p be the odd part of n.

    1. Consider every way to write p as a product of factors greater than one, in any number.
    2. Give each factor the smallest order ``factor · 2^t``, t ≥ 2, up to :data:`MAX_BASE`, that
       :func:`base_matrix` constructs. Drop the way if a factor has none, or if n does not contain
       that many twos.
    3. Take the way with the smallest sum of orders (the additions per element of a transform that
       applies each factor densely), among equals the fewest factors, then the lexicographically
       first ascending tuple.

    What remains of the powers of two is Sylvester's matrix, last in the product. Base matrices are
    part of the promise, entry by entry. A construction added later, or a larger bound, is for
    orders that have no way without it: an order once split stays split like that.

    Args:
        n: the order.

    Returns:
        The ascending base orders and the power of two, for example ``((28,), 512)`` for 14336.

    Raises:
        HadamardSizeError: no way is left; names the odd part and block sizes that do work.
        TypeError: ``n`` is no integer.
    """
    _require_int(n)
    found = _factors(n)
    if found is None:
        raise HadamardSizeError(_no_matrix(n))
    return found


def block_sizes(n: int) -> tuple[int, ...]:
    """All divisors of ``n`` above 1 that are orders of known Hadamard matrices, descending.

    Raises:
        TypeError: ``n`` is no integer.
    """
    _require_int(n)
    small = [d for d in range(1, isqrt(max(n, 0)) + 1) if n % d == 0]
    divisors = sorted({*small, *(n // d for d in small)}, reverse=True)
    return tuple(d for d in divisors if d > 1 and _factors(d) is not None)


def hadamard_matrix(n: int) -> Signs:
    """The Hadamard matrix of order ``n``, dense, ``(n, n)`` int8, new and writable.

    Raises:
        HadamardSizeError: none is known.
        TypeError: ``n`` is no integer.
    """
    bases, power = factors(n)
    product: Signs = reduce(np.kron, [*map(base_matrix, bases), _sylvester(power)])
    return product


@lru_cache(maxsize=64)
def base_matrix(m: int) -> Signs:
    """The Hadamard matrix of one construction, ``(m, m)`` int8, read-only.

    Sylvester's for a power of two; else the first that applies of Paley I (``m - 1`` a prime power
    that leaves 3 when divided by 4), Paley II (``m/2 - 1`` a prime power that leaves 1),
    Williamson. It is not symmetric in general (12 and 28 are not): its inverse is its transpose.

    Raises:
        HadamardSizeError: none of these constructs it.
    """
    if m > 0 and m & (m - 1) == 0:
        matrix = _sylvester(m)
    elif _is_paley_1(m):
        matrix = _paley_1(m - 1)
    elif _is_paley_2(m):
        matrix = _paley_2(m // 2 - 1)
    elif m % 4 == 0 and m // 4 in WILLIAMSON:
        matrix = _williamson(WILLIAMSON[m // 4])
    else:
        raise HadamardSizeError(f"no construction of a Hadamard base matrix of order {m} is known")
    matrix = np.ascontiguousarray(matrix)
    matrix.flags.writeable = False
    return matrix


@lru_cache(maxsize=4096)
def _factors(n: int) -> tuple[tuple[int, ...], int] | None:
    if n < 1:
        return None
    twos = (n & -n).bit_length() - 1
    odd = n >> twos
    candidates = []
    for parts in _factorisations(odd):
        orders = [_base_order(part, twos) for part in parts]
        bases = tuple(sorted(order for order in orders if order is not None))
        power, rest = divmod(n, prod(bases))
        if len(bases) == len(parts) and rest == 0:
            candidates.append((sum(bases), len(bases), bases, power))
    return min(candidates)[2:] if candidates else None


def _factorisations(n: int, smallest: int = 3) -> Iterator[tuple[int, ...]]:
    """All unordered factorisations of an odd number into factors that a base order can have."""
    if n == 1:
        yield ()
    for first in range(smallest, min(n, MAX_BASE // 4) + 1, 2):
        if n % first == 0:
            for rest in _factorisations(n // first, first):
                yield (first, *rest)


def _base_order(part: int, twos: int) -> int | None:
    """The smallest constructible order ``part · 2^t`` with 2 ≤ t ≤ twos."""
    for t in range(2, twos + 1):
        m = part << t
        if m > MAX_BASE:
            return None
        if _is_paley_1(m) or _is_paley_2(m) or (t == 2 and part in WILLIAMSON):
            return m
    return None


def _require_int(n: object) -> None:
    if not isinstance(n, int) or isinstance(n, bool):
        raise TypeError(f"the order of a Hadamard matrix is an int, got {n!r}")


def _no_matrix(n: int) -> str:
    odd = n // (n & -n) if n > 0 else n
    shown = f"{n} = {odd}·{n // odd}" if 1 < odd < n else f"{n}"
    message = f"no Hadamard matrix of order {shown} is known to fastrot"
    sizes = block_sizes(n)
    if not sizes:
        return message
    more = ", …" if len(sizes) > 4 else ""
    return f"{message}; block sizes that work: {', '.join(map(str, sizes[:4]))}{more}"


def _sylvester(power: int) -> Signs:
    """``H_2 ⊗ … ⊗ H_2`` with ``H_2 = [[1, 1], [1, -1]]``, in natural order."""
    matrix: Signs = np.ones((1, 1), dtype=np.int8)
    while len(matrix) < power:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _is_paley_1(m: int) -> bool:
    return m % 4 == 0 and _prime_power(m - 1) is not None


def _is_paley_2(m: int) -> bool:
    return m % 4 == 0 and (m // 2 - 1) % 4 == 1 and _prime_power(m // 2 - 1) is not None


def _prime_power(q: int) -> tuple[int, int] | None:
    """``(p, k)`` with p prime and ``q = p^k``."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 1
    while p**k < q:
        k += 1
    return (p, k) if p**k == q else None


def _jacobsthal(q: int) -> Signs:
    """``Q[i, j] = χ(aᵢ - aⱼ)`` over the field of q elements, χ its quadratic character.

    The field is built on a primitive element x: its even powers are the squares.
    """
    found = _prime_power(q)
    assert found is not None
    p, k = found
    weights = p ** np.arange(k)
    powers = _primitive_powers(p, k)
    character = np.zeros(q, dtype=np.int8)
    character[powers @ weights] = 1 - 2 * (np.arange(q - 1) % 2)
    digits = np.arange(q)[:, None] // weights % p
    difference = np.zeros((q, q), dtype=np.int64)
    for i in range(k):
        difference += (digits[:, None, i] - digits[None, :, i]) % p * weights[i]
    return character[difference]


def _primitive_powers(p: int, k: int) -> npt.NDArray[np.int64]:
    """``x⁰ … x^(q-2)`` modulo the first monic polynomial under which x has order q - 1.

    Only in a field can x have that order: the polynomial is then primitive.
    """
    one = np.zeros(k, dtype=np.int64)
    one[0] = 1
    for code in range(1, p**k):
        tail = np.array([code // p**i % p for i in range(k)])
        powers = np.zeros((p**k - 1, k), dtype=np.int64)
        element = one
        for i in range(len(powers)):
            powers[i] = element
            carry = element[-1]
            element = np.roll(element, 1)
            element[0] = 0
            element = (element - carry * tail) % p
            if (element == one).all():
                break
        if i == len(powers) - 1 and (element == one).all():
            return powers
    raise AssertionError(f"no primitive polynomial of degree {k} over GF({p})")


def _paley_1(q: int) -> Signs:
    """``I + S``, S skew: a border of ones around the Jacobsthal matrix of ``q ≡ 3 (mod 4)``."""
    s = np.zeros((q + 1, q + 1), dtype=np.int8)
    s[0, 1:] = 1
    s[1:, 0] = -1
    s[1:, 1:] = _jacobsthal(q)
    return s + np.eye(q + 1, dtype=np.int8)


def _paley_2(q: int) -> Signs:
    """``C ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]]`` with a symmetric conference matrix C."""
    c = np.zeros((q + 1, q + 1), dtype=np.int8)
    c[0, 1:] = c[1:, 0] = 1
    c[1:, 1:] = _jacobsthal(q)
    ones = np.array([[1, 1], [1, -1]], dtype=np.int8)
    unit = np.array([[1, -1], [-1, -1]], dtype=np.int8)
    result: Signs = np.kron(c, ones) + np.kron(np.eye(q + 1, dtype=np.int8), unit)
    return result


def _williamson(halves: tuple[str, ...]) -> Signs:
    """Williamson's array of four symmetric circulants with ``A² + B² + C² + D² = 4n I``."""
    a, b, c, d = (_circulant(half) for half in halves)
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


def _circulant(half: str) -> Signs:
    row: Signs = np.array([1 if c == "+" else -1 for c in half + half[:0:-1]], dtype=np.int8)
    index = np.arange(len(row))
    matrix: Signs = row[(index[None, :] - index[:, None]) % len(row)]
    return matrix
