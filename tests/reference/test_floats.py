"""Rounding, fused multiply-add and canonical NaN against the twin's integers."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitassay.reference.floats import (
    bits,
    canonical_nan,
    exponent,
    fma,
    power_of_two,
    round_to,
)
from bitassay.reference.spec.dtypes import DTYPES
from support.hard_matrices import KINDS, matrix, specials
from support.naive import tensor_core as twin
from support.same_bits import assert_same_bits, from_patterns, patterns

FORMATS = {
    torch.float32: twin.FP32,
    torch.float64: twin.FP64,
    torch.bfloat16: twin.BF16,
    torch.float16: twin.FP16,
}
TARGETS = [torch.bfloat16, torch.float16, torch.float32]


def tricky_fractions(width: int) -> list[int]:
    """Fractions at, just below and just above every halfway point that rounding may meet."""
    whole = 1 << width
    found = {0, 1, 2, whole - 1, whole - 2}
    for kept in range(width):  # also fewer bits than a normal result keeps: subnormal results
        half = 1 << (width - kept - 1)
        for even_or_odd in (0, 2 * half, whole - 2 * half):
            found |= {(even_or_odd + half + d) % whole for d in (-1, 0, 1)}
    return sorted(found)


def check_rounding(values: list[int], source: torch.dtype, target: torch.dtype) -> None:
    want = [twin.convert(value, FORMATS[source], FORMATS[target]) for value in values]
    got = round_to(from_patterns(values, source), target)
    assert_same_bits(got, from_patterns(want, target))


@pytest.mark.parametrize("target", TARGETS)
def test_round_fp32_at_every_exponent(target: torch.dtype) -> None:
    fractions = tricky_fractions(23)
    values = [
        sign << 31 | field << 23 | fraction
        for sign, field, fraction in product((0, 1), range(256), fractions)
    ]
    check_rounding(values, torch.float32, target)


@pytest.mark.parametrize("target", TARGETS)
def test_round_fp64_at_every_exponent_that_matters(target: torch.dtype) -> None:
    """Fractions here sit a last bit of fp64 off a tie: rounding through fp32 would show."""
    fields = [0, 1, *range(1023 - 155, 1023 + 131), 2045, 2046, 2047]
    fractions = tricky_fractions(52)
    values = [
        sign << 63 | field << 52 | fraction
        for sign, field, fraction in product((0, 1), fields, fractions)
    ]
    check_rounding(values, torch.float64, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", [torch.float32, torch.float64])
def test_round_any_pattern(source: torch.dtype, target: torch.dtype) -> None:
    width = 8 * source.itemsize

    @settings(max_examples=300, derandomize=True, deadline=None, database=None)
    @given(st.lists(st.integers(0, (1 << width) - 1), min_size=1, max_size=8))
    def check(values: list[int]) -> None:
        check_rounding(values, source, target)

    check()


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16])
def test_values_of_the_target_stay(target: torch.dtype) -> None:
    every = from_patterns(range(1 << 16), target)
    for source in (torch.float32, torch.float64):
        assert_same_bits(round_to(every.to(source), target), canonical_nan(every))


@pytest.mark.parametrize("dtype", TARGETS)
def test_canonical_nan(dtype: torch.dtype) -> None:
    values = patterns(specials(dtype).view(dtype)) + list(range(0x7F80, 0x8000))
    values += [value | 1 << (8 * dtype.itemsize - 1) for value in values]
    fmt = FORMATS[dtype]
    want = [fmt.nan if twin.decode(v, fmt).kind == "nan" else v for v in values]
    assert_same_bits(canonical_nan(from_patterns(values, dtype)), from_patterns(want, dtype))
    assert DTYPES[dtype].canonical_nan == fmt.nan


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e5m2, torch.int32])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=str(dtype)):
        canonical_nan(torch.zeros(2).to(dtype))
    with pytest.raises(TypeError, match=str(dtype)):
        round_to(torch.zeros(2), dtype)


def test_bits_share_memory() -> None:
    for dtype in (*FORMATS, torch.float8_e4m3fn, torch.float8_e5m2):
        x = torch.zeros(2, 3).to(dtype)
        view = bits(x)
        assert view.element_size() == x.element_size()
        view[1, 2] = 1
        assert patterns(x) == [0, 0, 0, 0, 0, 1]


def test_powers_and_exponents_of_two() -> None:
    e = torch.arange(-1022, 1024)
    want = torch.tensor([math.ldexp(1.0, k) for k in e.tolist()], dtype=torch.float64)
    assert_same_bits(power_of_two(e), want)
    assert_same_bits(exponent(-1.75 * want[:-1]), e[:-1])
    assert exponent(torch.zeros(1, dtype=torch.float64)).item() == -1023


def fma_by_twin(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    triples = zip(patterns(a), patterns(b), patterns(c), strict=True)
    return from_patterns([twin.fma(*triple) for triple in triples], torch.float32).view(a.shape)


def addends(a: Tensor, b: Tensor, seed: int) -> list[Tensor]:
    """c of every kind; the last three meet the product in its last places or far below them."""
    product = a.double() * b.double()
    near = (-product).to(torch.float32)
    g = torch.Generator().manual_seed(seed)
    nudge = torch.randint(-2, 3, near.shape, generator=g, dtype=torch.int32)
    nudged = torch.where(near.isfinite(), near.view(torch.int32) + nudge, 0).view(torch.float32)
    far = torch.randint(-60, 61, near.shape, generator=g)
    scaled = (product * power_of_two(far)).to(torch.float32)
    others = [matrix(kind, *a.shape, torch.float32, seed) for kind in KINDS]
    return [*others, near, nudged, scaled]


@pytest.mark.parametrize("kind", KINDS)
def test_fma(kind: str) -> None:
    a, b = (matrix(kind, 6, 30, torch.float32, seed) for seed in (1, 2))
    for seed, c in enumerate(addends(a, b, 3)):
        assert_same_bits(fma(a, b, c), fma_by_twin(a, b, c))
        other = matrix("wide", 6, 30, torch.float32, seed)
        assert_same_bits(fma(a, other, c), fma_by_twin(a, other, c))


def test_fma_of_every_three_special_values() -> None:
    pool = specials(torch.float32).view(torch.float32)
    a, b, c = torch.meshgrid(pool, pool, pool, indexing="ij")
    assert_same_bits(fma(a, b, c), fma_by_twin(a, b, c))


def test_fma_where_two_roundings_would_show() -> None:
    """a·b is a tie of fp32 and c, far below fp64's last place, decides it."""
    a = torch.full((64,), 1 + 2.0**-12)
    b = torch.full((64,), 1 + 2.0**-12)  # product 1 + 2^-11 + 2^-24: half an ulp
    c = torch.tensor([sign * 2.0**-e for e in range(60, 92) for sign in (1, -1)])
    got = fma(a, b, c)
    assert_same_bits(got, fma_by_twin(a, b, c))
    assert got[0] != got[1]


def test_fma_one_last_bit_of_fp64_from_a_tie() -> None:
    """Exact sums a hair from one place of fp64 beside a tie: none may be moved onto the tie."""
    ulp = 2.0**-23
    a = torch.tensor([1 + 511 * ulp, 1 + 1984 * ulp])
    b = torch.tensor([1 - 1022 * ulp / 2, 1 - 3967 * ulp / 2]) * 2.0**-24
    c = torch.tensor([1 + ulp, 1.0])  # a tie would go up from the first, down from the second
    for sign in (1.0, -1.0):
        got = fma(sign * a, b, sign * c)
        assert_same_bits(got, fma_by_twin(sign * a, b, sign * c))
        assert_same_bits(got, sign * torch.tensor([1 + ulp, 1 + ulp]))


def test_fma_broadcasts() -> None:
    a, b, c = (matrix("normal", *s, torch.float32, 4) for s in ((5, 1), (1, 7), (5, 7)))
    want = fma_by_twin(*(x.expand(5, 7) for x in (a, b, c)))
    assert_same_bits(fma(a, b, c), want)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_the_gpu_gives_the_same_bits(kind: str, cuda: torch.device) -> None:
    a, b = (matrix(kind, 300, 301, torch.float32, seed) for seed in (5, 6))
    for c in addends(a, b, 7):
        want = fma(a, b, c)
        assert_same_bits(fma(a.to(cuda), b.to(cuda), c.to(cuda)), want)
        for target in TARGETS:
            assert_same_bits(round_to(c.to(cuda), target), round_to(c, target))
            wide = a.double() * b.double() + c.double()
            assert_same_bits(round_to(wide.to(cuda), target), round_to(wide, target))
