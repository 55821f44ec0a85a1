"""Slow twins of a transformer's operations, in Python integers, from the contract's words.

Values are bit patterns, as in naive/tensor_core.py, whose roundings every step of fp32 takes. A row
or a head is a list of patterns. Nothing here is shared with the reference but the coefficients of
the polynomials, which are data.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

from bitassay.reference.spec import polynomials
from support.naive import tensor_core as twin
from support.naive.tensor_core import FP32, add, convert, decode, fma, round_nearest

NAN, INFINITY, ONE, SIGN = 0x7FFFFFFF, 0x7F800000, 0x3F800000, 0x80000000
MINUS_INFINITY = INFINITY | SIGN


def fp32(value: float) -> int:
    """The bits of a number as fp32: one rounding, exact for every constant here."""
    numerator, denominator = value.as_integer_ratio()
    return round_nearest((numerator << twin.UNIT) // denominator, FP32)


MAGIC, LOG2E = fp32(polynomials.MAGIC), fp32(polynomials.LOG2E)
LN2_HI, LN2_LO = fp32(polynomials.LN2_HI), fp32(polynomials.LN2_LO)
EXP2, EXP, LOG1P = (
    [fp32(c) for c in row] for row in (polynomials.EXP2, polynomials.EXP, polynomials.LOG1P)
)
SOFTMAX_SCALE = {size: fp32(c) for size, c in polynomials.SOFTMAX_SCALE.items()}


def is_nan(x: int) -> bool:
    return x & ~SIGN > INFINITY


def negated(x: int) -> int:
    return NAN if is_nan(x) else x ^ SIGN


def subtract(a: int, b: int) -> int:
    return add(a, negated(b))


def multiply(a: int, b: int) -> int:
    return fma(a, b, SIGN)  # -0 leaves every product and the sign of a zero as they are


def below(a: int, b: int) -> bool:
    """a < b; False where one is NaN."""
    return not is_nan(a) and not is_nan(b) and twin.rank(a, FP32) < twin.rank(b, FP32)


def divide(a: int, b: int) -> int:
    """a / b, rounded to nearest-even."""
    x, y = decode(a, FP32), decode(b, FP32)
    negative = x.negative != y.negative
    undefined = x.kind == y.kind == "inf" or (x.is_zero and y.is_zero)
    if "nan" in (x.kind, y.kind) or undefined:
        return NAN
    if x.kind == "inf" or y.is_zero:
        return FP32.infinity(negative)
    if y.kind == "inf":
        return int(negative) << 31
    quotient, rest = divmod(x.magnitude << twin.UNIT, y.magnitude)
    quotient |= rest != 0  # sticky: far below the last bit that rounding looks at
    return round_nearest(-quotient if negative else quotient, FP32, zero_sign=negative)


def square_root(a: int) -> int:
    """The square root, rounded to nearest-even."""
    x = decode(a, FP32)
    if x.kind == "nan" or (x.negative and not x.is_zero):
        return NAN
    if x.kind == "inf" or x.is_zero:
        return a
    scaled = x.magnitude << twin.UNIT
    root = isqrt(scaled)
    return round_nearest(root | (root * root != scaled), FP32)


def whole(n: int) -> int:
    """The value, a Python integer, of a fp32 that is a whole number."""
    return decode(n, FP32).signed >> twin.UNIT


def horner(coefficients: list[int], x: int) -> int:
    p = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        p = fma(p, x, c)
    return p


def scaled(p: int, n: int) -> int:
    """p * 2**n for an n of fp32 that is a whole number from -126 to 127."""
    return multiply(p, fp32(2.0 ** whole(n)))


def exp2(x: int) -> int:
    if is_nan(x):
        return NAN
    if below(x, fp32(-126.0)):
        return 0
    if not below(x, fp32(127.5)):
        return INFINITY
    n = subtract(add(x, MAGIC), MAGIC)
    return scaled(horner(EXP2, subtract(x, n)), n)


def exp(x: int) -> int:
    """e**x for x <= 0."""
    if is_nan(x):
        return NAN
    n = subtract(fma(x, LOG2E, MAGIC), MAGIC)
    if below(n, fp32(-126.0)):
        return 0
    r = fma(n, negated(LN2_HI), x)
    r = fma(n, negated(LN2_LO), r)
    return scaled(horner(EXP, r), n)


def log(s: int) -> int:
    """The natural logarithm of a finite s >= 1: s = 2**k * f, f in [sqrt(1/2), sqrt(2))."""
    k, f = (s >> 23) - 127, (s & 0x7FFFFF) | ONE
    if f - (1 << 23) >= 0x3F3504F3:  # f / 2 is not below sqrt(1/2)
        k, f = k + 1, f - (1 << 23)
    t = subtract(f, ONE)
    y = fma(multiply(t, t), horner(LOG1P, t), t)
    y = fma(fp32(float(k)), LN2_LO, y)
    return fma(fp32(float(k)), LN2_HI, y)


def silu(x: int) -> int:
    if is_nan(x):
        return NAN
    e = exp(x | SIGN)
    # -0 >= 0 holds, so -0 stays as it is.
    numerator = multiply(x, e) if below(x, 0) else x
    return divide(numerator, add(ONE, e))


def tree_sum(row: list[int]) -> int:
    """The halving tree seen from its root: the last addition joins even and odd indices."""
    width = 1
    while width < len(row):
        width *= 2

    def total(first: int, stride: int) -> int:
        if stride == width:
            return row[first] if first < len(row) else 0
        return add(total(first, 2 * stride), total(first + stride, 2 * stride))

    return total(0, 1)


def rms_norm(x: list[int], weight: list[int], eps: float, kind: str) -> list[int]:
    fmt = twin.FORMATS[kind]
    h = [convert(v, fmt, FP32) for v in x]
    mean = divide(tree_sum([multiply(v, v) for v in h]), fp32(float(len(h))))
    rms = square_root(add(mean, fp32(eps)))
    return [
        convert(multiply(divide(v, rms), convert(w, fmt, FP32)), FP32, fmt)
        for v, w in zip(h, weight, strict=True)
    ]


def add_rows(x: list[int], residual: list[int], kind: str) -> list[int]:
    """The new residual stream: the fp32 sum, rounded to the format."""
    fmt = twin.FORMATS[kind]
    return [
        convert(add(convert(a, fmt, FP32), convert(b, fmt, FP32)), FP32, fmt)
        for a, b in zip(x, residual, strict=True)
    ]


def rotate(head: list[int], cos: list[int], sin: list[int], kind: str) -> list[int]:
    """One head turned to its position."""
    fmt, half = twin.FORMATS[kind], len(head) // 2
    x = [convert(v, fmt, FP32) for v in head]
    first, second = x[:half], x[half:]
    turned = [
        fma(a, c, negated(multiply(b, s)))
        for a, b, c, s in zip(first, second, cos, sin, strict=True)
    ]
    turned += [
        fma(b, c, multiply(a, s)) for a, b, c, s in zip(first, second, cos, sin, strict=True)
    ]
    return [convert(v, FP32, fmt) for v in turned]


def silu_and_mul(row: list[int], kind: str) -> list[int]:
    fmt, half = twin.FORMATS[kind], len(row) // 2
    x = [convert(v, fmt, FP32) for v in row]
    return [
        convert(multiply(silu(g), u), FP32, fmt) for g, u in zip(x[:half], x[half:], strict=True)
    ]


def maximum(a: int, b: int) -> int:
    """The larger; NaN loses to numbers."""
    if is_nan(a):
        return MINUS_INFINITY if is_nan(b) else b
    return b if below(a, b) else a


def attention_sums(  # one query row of one head: q [D], keys and values [S][D]
    q: list[int],
    keys: list[list[int]],
    values: list[list[int]],
    position: int,
    *,
    kind: str,
    arch: str,
    key_block: int = 64,
    key_split: int = 1024,
) -> tuple[int, list[int]]:
    """The weights' sum and the weighted values, in fp32, after all splits are folded.

    position: the query's; keys and values are those of all S positions.
    """
    fmt, size = twin.FORMATS[kind], len(q)

    def weight(old: int, new: int) -> int:
        return exp2(subtract(old, new if below(MINUS_INFINITY, new) else 0))

    everything = (MINUS_INFINITY, 0, [0] * size)
    for split in range(0, position + 1, key_split):
        m, total, acc = MINUS_INFINITY, 0, [0] * size
        for block in range(split, split + key_split, key_block):
            scores = [MINUS_INFINITY] * key_block
            rows = [[0] * size] * key_block
            for j, key in enumerate(range(block, min(block + key_block, len(keys)))):
                rows[j] = values[key]
                if key <= position:
                    score = twin.dot(q, keys[key], 0, kind, arch)
                    scores[j] = multiply(score, SOFTMAX_SCALE[size])
            highest = m
            for score in scores:
                highest = maximum(highest, score)
            p = [weight(score, highest) for score in scores]
            keep = weight(m, highest)
            total = fma(total, keep, tree_sum(p))
            rounded = [convert(v, FP32, fmt) for v in p]
            acc = [
                twin.dot(rounded, [row[d] for row in rows], multiply(acc[d], keep), kind, arch)
                for d in range(size)
            ]
            m = highest
            if block + key_block > position:  # later blocks are masked whole
                break
        best, sums, heap = everything
        highest = maximum(best, m)
        a, b = weight(best, highest), weight(m, highest)
        everything = (
            highest,
            fma(sums, a, multiply(total, b)),
            [fma(x, a, multiply(y, b)) for x, y in zip(heap, acc, strict=True)],
        )
    return everything[1:]


def attention(q: list[int], *rows: Any, kind: str, **options: Any) -> list[int]:
    """The output row; arguments as `attention_sums`."""
    total, values = attention_sums(q, *rows, kind=kind, **options)
    return [convert(add(divide(x, total), 0), FP32, twin.FORMATS[kind]) for x in values]


def log_softmax(row: list[int], kind: str, sum_width: int = 4096) -> list[int]:
    """Log-probabilities in fp32."""
    x = [convert(v, twin.FORMATS[kind], FP32) for v in row]
    highest = MINUS_INFINITY
    for value in x:
        highest = maximum(highest, value)
    d = [subtract(value, highest) for value in x]
    sums = [
        tree_sum([exp(v) for v in d[first : first + sum_width]])
        for first in range(0, len(d), sum_width)
    ]
    total = sums[0]
    for part in sums[1:]:
        total = add(total, part)
    return [subtract(value, log(total)) for value in d]
