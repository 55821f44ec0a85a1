"""Every elementwise operation of the emulator against whole numbers, on every special value."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import pytest
import torch
import triton
from torch import Tensor

from support.kernel_operations import (
    ARITHMETIC,
    CHOICES,
    COMPARISONS,
    CONVERSIONS,
    DTYPES,
    INTEGER,
    SCALE,
    SCALED,
    TO_INTEGER,
    Operation,
    inputs,
    run,
)
from support.naive import tensor_core as twin
from support.naive.tensor_core import FORMATS, UNIT, Format, decode, round_nearest
from support.same_bits import assert_same_bits, from_patterns, patterns

pytestmark = pytest.mark.usefixtures("interpreting")


def by(operations: list[Operation]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("operation", operations, ids=str)


def as_floats(operation: Operation, compute: Callable[..., int]) -> Tensor:
    """The truth: compute(format, x, y, z) on the patterns of each element."""
    fmt = FORMATS[operation.source]
    rows = zip(*(patterns(t) for t in inputs(operation)), strict=True)
    return from_patterns([compute(fmt, *row) for row in rows], DTYPES[operation.target])


def linear(fmt: Format, *terms: tuple[int, ...]) -> int:
    """Σ of products of patterns, rounded once; the twin's rules for special values."""
    factors = [tuple(decode(bits, fmt) for bits in term) for term in terms]
    special = twin._special_sum(factors, fmt)
    if special is not None:
        return special
    total, negative = 0, []
    for numbers in factors:
        value, sign = 1 << UNIT, False
        for x in numbers:
            value, sign = value * x.magnitude >> UNIT, sign != x.negative
        total += -value if sign else value
        negative.append(sign)
    return round_nearest(total, fmt, zero_sign=all(negative))


def flip(fmt: Format, bits: int) -> int:
    return bits ^ 1 << (fmt.width - 1)


def quotient(fmt: Format, x: int, y: int) -> int:
    a, b = decode(x, fmt), decode(y, fmt)
    negative = a.negative != b.negative
    sign = int(negative) << (fmt.width - 1)
    if "nan" in (a.kind, b.kind) or (a.kind == b.kind == "inf") or (a.is_zero and b.is_zero):
        return fmt.nan
    if a.kind == "inf" or b.is_zero:
        return fmt.infinity(negative)
    if b.kind == "inf" or a.is_zero:
        return sign
    whole, rest = divmod(a.magnitude << UNIT, b.magnitude)
    whole = (whole << 1 | int(rest > 0)) << 1  # sticky, far below any bit that is kept
    return sign | _rounded(whole, 2, fmt)


def root(fmt: Format, x: int) -> int:
    a = decode(x, fmt)
    if a.is_zero:
        return x
    if a.kind == "nan" or a.negative:
        return fmt.nan
    if a.kind == "inf":
        return x
    whole = isqrt(a.magnitude << UNIT)
    sticky = int(whole * whole != a.magnitude << UNIT)
    return _rounded((whole << 1 | sticky) << 1, 2, fmt)


def _rounded(scaled: int, extra: int, fmt: Format) -> int:
    """Round a count of 2^-(UNIT + extra); the format keeps far fewer bits than UNIT."""
    sticky = int(scaled & ((1 << extra) - 1) != 0)
    kept = scaled >> extra
    if fmt.fraction_bits + 200 < UNIT and sticky:
        kept |= 1  # below 2^-UNIT nothing is kept, only that something was there
    return round_nearest(kept, fmt)


def integer_part(up: bool) -> Callable[..., int]:
    def compute(fmt: Format, x: int, *_: int) -> int:
        a = decode(x, fmt)
        if a.kind != "finite":
            return fmt.nan if a.kind == "nan" else x
        value = a.signed if a.exponent >= -126 and a.magnitude >= 1 << (UNIT - 126) else 0  # ftz
        whole = -(-value >> UNIT) if up else value >> UNIT
        return round_nearest(whole << UNIT, fmt, zero_sign=a.negative)

    return compute


TRUTHS: dict[str, Callable[..., int]] = {
    "add": lambda f, x, y, z: linear(f, (x,), (y,)),
    "sub": lambda f, x, y, z: linear(f, (x,), (flip(f, y),)),
    "mul": lambda f, x, y, z: linear(f, (x, y)),
    "fma": lambda f, x, y, z: linear(f, (x, y), (z,)),
    "div_rn": lambda f, x, y, z: quotient(f, x, y),
    "sqrt_rn": lambda f, x, y, z: root(f, x),
    "floor": integer_part(up=False),
    "ceil": integer_part(up=True),
}


@by(ARITHMETIC)
def test_arithmetic_is_correctly_rounded(operation: Operation, gpu_emulation: str) -> None:
    assert_same_bits(run(operation), as_floats(operation, TRUTHS[operation.name]))


@by(SCALED)
def test_a_float_argument_is_fp32(operation: Operation, gpu_emulation: str) -> None:
    fmt, single = FORMATS[operation.source], FORMATS["fp32"]
    scale = patterns(torch.tensor(SCALE))[0]
    wide = [twin.convert(b, fmt, single) for b in patterns(inputs(operation)[0])]
    want = [linear(single, (b, scale)) for b in wide]
    assert_same_bits(run(operation), from_patterns(want, torch.float32))


def is_nan(fmt: Format, bits: int) -> bool:
    return decode(bits, fmt).kind == "nan"


def order(fmt: Format, bits: int) -> int:
    """A whole number that orders the values, -0 below +0."""
    magnitude = bits & ((1 << (fmt.width - 1)) - 1)
    return -magnitude - 1 if bits >> (fmt.width - 1) else magnitude


def best(fmt: Format, x: int, y: int, largest: bool, propagate: bool) -> int:
    nans = is_nan(fmt, x) + is_nan(fmt, y)
    if nans == 2 or (propagate and nans):
        return fmt.nan
    if nans:
        return y if is_nan(fmt, x) else x
    return (max if largest else min)(x, y, key=lambda bits: order(fmt, bits))


def clamped(fmt: Format, x: int, propagate: bool) -> int:
    above = best(fmt, x, 0xC0000000, True, propagate)
    return best(fmt, above, 0x40400000, False, propagate)


def negated(fmt: Format, x: int) -> int:
    if triton.__version__.startswith("3.9"):
        return flip(fmt, x)
    return linear(fmt, (0,), (flip(fmt, x),))  # Triton 3.6 and 3.7 compile -x to 0 - x


def chosen(fmt: Format, x: int, y: int, z: int) -> int:
    return z if not (is_nan(fmt, x) or is_nan(fmt, y)) and value(fmt, x) < value(fmt, y) else x


def value(fmt: Format, bits: int) -> int:
    number = decode(bits, fmt)
    if number.kind == "inf":
        return -(1 << 3000) if number.negative else 1 << 3000
    return number.signed


CHOICE_TRUTHS: dict[str, Callable[..., int]] = {
    "neg": lambda f, x, y, z: negated(f, x),
    "abs": lambda f, x, y, z: x & ((1 << (f.width - 1)) - 1),
    "where": chosen,
    "max": lambda f, x, y, z: best(f, x, y, True, False),
    "min": lambda f, x, y, z: best(f, x, y, False, False),
    "max_nan": lambda f, x, y, z: best(f, x, y, True, True),
    "min_nan": lambda f, x, y, z: best(f, x, y, False, True),
    "clamp": lambda f, x, y, z: clamped(f, x, False),
    "clamp_nan": lambda f, x, y, z: clamped(f, x, True),
}


@by(CHOICES)
def test_choices(operation: Operation, gpu_emulation: str) -> None:
    assert_same_bits(run(operation), as_floats(operation, CHOICE_TRUTHS[operation.name]))


COMPARE: dict[str, Callable[[int, int], bool]] = {
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
}


@by(COMPARISONS)
def test_comparisons_are_false_for_nan(operation: Operation, gpu_emulation: str) -> None:
    def compute(fmt: Format, x: int, y: int, z: int) -> int:
        if is_nan(fmt, x) or is_nan(fmt, y):
            return int(operation.name == "ne")
        return int(COMPARE[operation.name](value(fmt, x), value(fmt, y)))

    assert_same_bits(run(operation), as_floats(operation, compute))


@by(CONVERSIONS)
def test_conversions_round_as_the_architecture_does(
    operation: Operation, gpu_emulation: str
) -> None:
    target = FORMATS[operation.target]
    x = inputs(operation)[0]
    if (operation.source, operation.target) == ("bf16", "fp32"):
        want = [b << 16 for b in patterns(x)]  # a shift: what a NaN carries stays
    elif operation.source in FORMATS:
        want = [twin.convert(b, FORMATS[operation.source], target) for b in patterns(x)]
    else:
        # sm_89 has no instruction from integers to bf16: it goes through fp32 and rounds twice.
        twice = operation.target == "bf16" and gpu_emulation == "sm_89"
        first = FORMATS["fp32"] if twice else target
        want = [round_nearest(n << UNIT, first) for n in x.tolist()]
        want = [twin.convert(b, first, target) for b in want]
    assert_same_bits(run(operation), from_patterns(want, DTYPES[operation.target]))


@by(TO_INTEGER)
def test_truncation(operation: Operation, gpu_emulation: str) -> None:
    fmt, dtype = FORMATS[operation.source], DTYPES[operation.target]
    numbers = [decode(b, fmt) for b in patterns(inputs(operation)[0])]
    want = [(x.magnitude >> UNIT) * (-1 if x.negative else 1) for x in numbers]
    assert_same_bits(run(operation), torch.tensor(want, dtype=dtype))


INTEGER_TRUTHS: dict[str, Callable[..., int]] = {
    "add": lambda x, y, bits: x + y,
    "sub": lambda x, y, bits: x - y,
    "mul": lambda x, y, bits: x * y,
    "and": lambda x, y, bits: x & y,
    "or": lambda x, y, bits: x | y,
    "xor": lambda x, y, bits: x ^ y,
    "not": lambda x, y, bits: ~x,
    "shift_left": lambda x, y, bits: x << (y & 7),
    "shift_right": lambda x, y, bits: x >> (y & 7),
    "max": lambda x, y, bits: max(x, y),
    "min": lambda x, y, bits: min(x, y),
    "mulhi": lambda x, y, bits: (x % (1 << bits)) * (y % (1 << bits)) >> bits,
    "divide": lambda x, y, bits: _truncated(x, y or 1),
    "remainder": lambda x, y, bits: x - (y or 1) * _truncated(x, y or 1),
}


def _truncated(x: int, y: int) -> int:
    """C's division, toward zero."""
    return abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)


@by(INTEGER)
def test_integers_wrap(operation: Operation, gpu_emulation: str) -> None:
    dtype = DTYPES[operation.source]
    bits = 8 * dtype.itemsize
    x, y, _ = (t.tolist() for t in inputs(operation))
    truth = INTEGER_TRUTHS[operation.name]
    want = [truth(a, b, bits) % (1 << bits) for a, b in zip(x, y, strict=True)]
    assert_same_bits(
        run(operation).view(_SIGNED[dtype.itemsize]), from_patterns(want, _SIGNED[dtype.itemsize])
    )


_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
