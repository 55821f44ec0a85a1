"""A slow twin of the tensor core, in Python integers, from the definition and nothing else.

Every number is an integer count of 2^-UNIT, so all arithmetic here is exact and the only roundings
are the two functions that say so. Values go in and out as bit patterns (Python ints): no tensor
library decides anything here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

UNIT = 1100  # finer than a fp64 subnormal (2^-1074) and than any product of two fp32 (2^-298)
MASK64 = (1 << 64) - 1


@dataclass(frozen=True)
class Format:
    """A binary floating-point format; `dropped` low bits of the container are ignored."""

    exponent_bits: int
    fraction_bits: int
    ieee_specials: bool = True  # False: e4m3fn, no infinity, one NaN per sign
    dropped: int = 0

    @property
    def bias(self) -> int:
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def width(self) -> int:
        return 1 + self.exponent_bits + self.fraction_bits + self.dropped

    @property
    def nan(self) -> int:
        return (1 << (self.width - 1)) - 1

    def infinity(self, negative: bool) -> int:
        exponent = (1 << self.exponent_bits) - 1
        return ((int(negative) << self.exponent_bits) | exponent) << self.fraction_bits


BF16, FP16 = Format(8, 7), Format(5, 10)
FP32, FP64 = Format(8, 23), Format(11, 52)
TF32 = Format(8, 10, dropped=13)  # a fp32 whose low 13 bits the tensor core does not see
E4M3, E5M2 = Format(4, 3, ieee_specials=False), Format(5, 2)
FORMATS = {"bf16": BF16, "fp16": FP16, "tf32": TF32, "e4m3": E4M3, "e5m2": E5M2, "fp32": FP32}


@dataclass(frozen=True)
class Step:
    """One tensor-core step: products a step, alignment bits, exponent floor, result bits."""

    group: int
    fraction_bits: int
    floor: int
    result_bits: int = 23


_AMPERE = {
    "bf16": Step(8, 24, -132),
    "fp16": Step(8, 24, -132),
    "tf32": Step(4, 24, -132),
}
_ADA = _AMPERE | {"e4m3": Step(16, 13, -132, 13), "e5m2": Step(16, 13, -132, 13)}
_HOPPER = {
    "bf16": Step(16, 25, -133),
    "fp16": Step(16, 25, -133),
    "tf32": Step(8, 25, -133),
    "e4m3": Step(32, 13, -133, 13),
    "e5m2": Step(32, 13, -133, 13),
}
STEPS = {"sm_80": _AMPERE, "sm_86": _AMPERE, "sm_89": _ADA, "sm_90": _HOPPER}


@dataclass(frozen=True)
class Number:
    """A decoded value: `kind` finite, inf or nan; `magnitude` in 2^-UNIT; never normalised."""

    kind: str
    negative: bool
    magnitude: int = 0
    exponent: int = 0

    @property
    def signed(self) -> int:
        return -self.magnitude if self.negative else self.magnitude

    @property
    def is_zero(self) -> bool:
        return self.kind == "finite" and self.magnitude == 0


@lru_cache(maxsize=1 << 17)
def decode(bits: int, fmt: Format) -> Number:
    """The value of a bit pattern; a subnormal keeps the format's smallest exponent."""
    bits >>= fmt.dropped
    fraction = bits & ((1 << fmt.fraction_bits) - 1)
    field = (bits >> fmt.fraction_bits) & ((1 << fmt.exponent_bits) - 1)
    negative = bool(bits >> (fmt.fraction_bits + fmt.exponent_bits))
    if field == (1 << fmt.exponent_bits) - 1:
        if fmt.ieee_specials:
            return Number("nan" if fraction else "inf", negative)
        if fraction == (1 << fmt.fraction_bits) - 1:
            return Number("nan", negative)
    significand = fraction if field == 0 else fraction | 1 << fmt.fraction_bits
    exponent = max(field, 1) - fmt.bias
    magnitude = significand << (exponent - fmt.fraction_bits + UNIT)
    return Number("finite", negative, magnitude, exponent)


def round_magnitude(magnitude: int, fmt: Format, *, kept: int, nearest: bool) -> int:
    """Round a count of 2^-UNIT to `kept` fraction bits of `fmt`: to nearest-even or toward zero.

    Returns the bits without a sign; beyond the largest finite value this is infinity.
    """
    if magnitude == 0:
        return 0
    exponent = max(magnitude.bit_length() - 1 - UNIT, 1 - fmt.bias)
    quantum = 1 << (exponent - kept + UNIT)
    significand, rest = divmod(magnitude, quantum)
    if nearest and (2 * rest > quantum or (2 * rest == quantum and significand & 1)):
        significand += 1
    significand <<= fmt.fraction_bits - kept
    # A subnormal has field 0 and no hidden bit; adding lets a carry run into the exponent.
    field = exponent + fmt.bias - 1
    return min((field << fmt.fraction_bits) + significand, fmt.infinity(False))


def round_nearest(value: int, fmt: Format, *, zero_sign: bool = False) -> int:
    """Round a signed count of 2^-UNIT to nearest-even; `zero_sign` is the sign of an exact 0."""
    negative = value < 0 if value else zero_sign
    bits = round_magnitude(abs(value), fmt, kept=fmt.fraction_bits, nearest=True)
    return bits | int(negative) << (fmt.width - 1)


def convert(bits: int, source: Format, target: Format) -> int:
    """One rounding to nearest-even from one format to another; NaN becomes the canonical NaN."""
    x = decode(bits, source)
    if x.kind == "nan":
        return target.nan
    if x.kind == "inf":
        return target.infinity(x.negative)
    return round_nearest(x.signed, target, zero_sign=x.negative)


def _special_sum(terms: list[tuple[Number, ...]], out: Format) -> int | None:
    """The result when a NaN or an infinity is among the factors; None when all are finite."""
    signs = set()
    for factors in terms:
        if any(f.kind == "nan" for f in factors):
            return out.nan
        if any(f.kind == "inf" for f in factors):
            if any(f.is_zero for f in factors):
                return out.nan
            signs.add(sum(f.negative for f in factors) % 2 == 1)
    if len(signs) == 2:
        return out.nan
    return out.infinity(signs.pop()) if signs else None


def step(
    a: list[int], b: list[int], c: int, fmt: Format, core: Step, *, half_output: bool = False
) -> int:
    """One instruction step: c + Σ a_i·b_i over at most one group, as bits of fp32 (or fp16)."""
    assert len(a) == len(b) <= core.group
    out = FP16 if half_output else FP32
    addend = decode(convert(c, FP32, FP16), FP16) if half_output else decode(c, FP32)
    pairs = [(decode(x, fmt), decode(y, fmt)) for x, y in zip(a, b, strict=True)]
    special = _special_sum([*pairs, (addend,)], out)
    if special is not None:
        return special
    # (signed value, exponent) of every term that is not zero.
    terms = []
    for x, y in pairs:
        if not x.is_zero and not y.is_zero:
            product = x.magnitude * y.magnitude >> UNIT  # exact: both are multiples of 2^-149
            terms.append(
                (-product if x.negative != y.negative else product, x.exponent + y.exponent)
            )
    if not addend.is_zero:
        terms.append((addend.signed, addend.exponent))
    largest = max([exponent for _, exponent in terms] + [core.floor])
    quantum = 1 << (largest - core.fraction_bits + UNIT)
    total = 0
    for value, _ in terms:
        kept = abs(value) // quantum * quantum
        total += -kept if value < 0 else kept
    kept_bits = out.fraction_bits if half_output else core.result_bits
    bits = round_magnitude(abs(total), out, kept=kept_bits, nearest=half_output)
    return bits | int(total < 0 and bits != 0) << (out.width - 1)


def dot(a: list[int], b: list[int], c: int, kind: str, arch: str) -> int:
    """c + Σ a_k·b_k in ascending groups, the last one padded with zeros."""
    core, fmt = STEPS[arch][kind], FORMATS[kind]
    for k in range(0, len(a), core.group):
        c = step(a[k : k + core.group], b[k : k + core.group], c, fmt, core)
    return c


def fma(a: int, b: int, c: int) -> int:
    """fp32 a·b + c with one rounding to nearest-even, signed zeros as IEEE 754 has them."""
    x, y, z = decode(a, FP32), decode(b, FP32), decode(c, FP32)
    special = _special_sum([(x, y), (z,)], FP32)
    if special is not None:
        return special
    product = x.signed * y.signed >> UNIT
    # An exact zero sum is -0 only when product and addend are both negative zeros.
    both_negative = x.negative != y.negative and z.negative
    return round_nearest(product + z.signed, FP32, zero_sign=both_negative)


def chain(a: list[int], b: list[int], c: int) -> int:
    """The ieee matmul: one ascending chain of fma from c, ended by + 0.0."""
    for x, y in zip(a, b, strict=True):
        c = fma(x, y, c)
    return add(c, 0)


def add(a: int, b: int) -> int:
    """fp32 a + b, rounded to nearest-even."""
    return fma(a, 0x3F800000, b)


def output(a: list[int], b: list[int], c: int, kind: str, arch: str) -> int:
    """One element of matmul; kind fp32 is the ieee chain."""
    return chain(a, b, c) if kind == "fp32" else dot(a, b, c, kind, arch)


def linear(x: list[int], w: list[int], bias: int | None, kind: str, arch: str) -> int:
    """One element of linear: round_to_dtype(fp32(acc + bias)), bias in the weight's format."""
    acc = output(x, w, 0, kind, arch)
    if bias is not None:
        acc = add(acc, convert(bias, FORMATS[kind], FP32))
    return convert(acc, FP32, FORMATS[kind])


def rank(bits: int, fmt: Format) -> int:
    """A whole number that orders all values of a format, one per ulp, with -0 and +0 both 0."""
    magnitude = bits & ((1 << (fmt.width - 1)) - 1)
    return -magnitude if bits >> (fmt.width - 1) else magnitude


def top_k(row: list[int], k: int, fmt: Format) -> list[int]:
    """The ids of the k highest logits: highest value first, lowest id first among equals."""
    return sorted(range(len(row)), key=lambda i: (-rank(row[i], fmt), i))[:k]


def margin(row: list[int], fmt: Format) -> int:
    """First minus second, in ulps: how many steps of the format lie between them."""
    first, second = sorted((rank(bits, fmt) for bits in row), reverse=True)[:2]
    return first - second


def mix(x: int) -> int:
    """The finalizer of splitmix64."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def fingerprint(row: list[int], fmt: Format) -> int:
    """The fingerprint of one row: Σ mix((i+1) << 32 | u_i) modulo 2^64."""
    total = 0
    for i, bits in enumerate(row):
        u = fmt.nan if decode(bits, fmt).kind == "nan" else bits
        total += mix((i + 1) << 32 | u)
    return total & MASK64


def fold(fingerprints: list[int]) -> int:
    """Rows folded in order into the fingerprint of a sequence."""
    total = 0
    for r, f in enumerate(fingerprints):
        total += mix((f + (r + 1) * 0x9E3779B97F4A7C15) & MASK64)
    return total & MASK64
