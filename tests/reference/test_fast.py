"""The fast path gives the bits of its definition, and its guard admits only what it can do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitassay.reference import tensor_core
from bitassay.reference.spec.arch import get_arch
from bitassay.reference.tensor_core import matmul, prepare
from support.hard_matrices import ADDENDS, KINDS, addend, matrix, specials
from support.matmul_cases import DTYPES, PRECISION, TENSOR_CORES, UNITS, by_steps, ordinary
from support.same_bits import assert_same_bits

every_core = pytest.mark.parametrize(("arch", "kind"), TENSOR_CORES)
WIDE_RANGE = [(arch, kind) for arch in ("sm_89", "sm_90") for kind in ("bf16", "tf32")]


def power(exponent: int) -> float:
    return 2.0**exponent


def check(
    a: Tensor, b: Tensor, c: Tensor | None, arch: str, kind: str, *, prepared: bool = True
) -> None:
    how = {"arch": arch, "precision": PRECISION.get(kind)}
    want = by_steps(a, b, c, arch, kind)
    assert_same_bits(matmul(a, b, c, **how), want)
    if prepared and kind != "fp32":
        assert_same_bits(matmul(a, prepare(b, **how), c, **how), want)


def check_every_addend(a: Tensor, b: Tensor, seed: int, arch: str, kind: str) -> None:
    """The same rows once with each, in one product: what a row is added to concerns no other."""
    product = a.float() @ b.float()
    c = torch.cat([addend(name, product, seed) for name in ADDENDS])
    check(torch.cat([a] * len(ADDENDS)), b, c, arch, kind)


@pytest.mark.parametrize("factor", KINDS)
@pytest.mark.parametrize(("arch", "kind"), UNITS)
def test_every_kind_of_factor_and_addend(arch: str, kind: str, factor: str) -> None:
    a = matrix(factor, 9, 70, DTYPES[kind], 20)
    b = matrix(factor, 31, 70, DTYPES[kind], 21).t()
    check(a, b, None, arch, kind)
    check_every_addend(a, b, 22, arch, kind)


@every_core
def test_ordinary_factors_with_every_kind_of_addend(arch: str, kind: str) -> None:
    a, b = ordinary(9, 70, DTYPES[kind], 23), ordinary(31, 70, DTYPES[kind], 24).t()
    check_every_addend(a, b, 25, arch, kind)


@pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 70])
@pytest.mark.parametrize(
    ("arch", "kind"), [("sm_89", "bf16"), ("sm_90", "bf16"), ("sm_90", "e4m3")]
)
def test_sizes_around_tile_borders(arch: str, kind: str, m: int) -> None:
    """N on either side of 512 columns, K neither whole groups nor whole chunks."""
    for n, k in ((1, 33), (127, 49), (513, 37)):
        a, b = matrix("normal", m, k, DTYPES[kind], m), matrix("normal", n, k, DTYPES[kind], n).t()
        check(a, b, None, arch, kind)


@every_core
def test_the_largest_sums_of_a_group(arch: str, kind: str) -> None:
    """Every term at its largest, of one sign: at 25 fraction bits this leaves int32."""
    dtype = DTYPES[kind]
    group = tensor_core.tensor_core(get_arch(arch), dtype).group
    largest = 2.0 - 2.0 ** -{"bf16": 7, "fp16": 10, "tf32": 10, "e4m3": 3, "e5m2": 2}[kind]
    for sign in (1.0, -1.0):
        a = torch.full((3, 3 * group), largest).to(dtype)
        b = (sign * torch.full((3 * group, 2), largest)).to(dtype)
        b[:group, 1] = 0.0
        check(a, b, None, arch, kind)
        for exponent in range(-2, 10):
            for c_sign in (1.0, -1.0):
                c = torch.full((3, 2), c_sign * (2.0 - 2.0**-23) * power(exponent))
                check(a, b, c, arch, kind)


@every_core
def test_a_long_k(arch: str, kind: str) -> None:
    """Past 1,024, where K is decomposed in pieces."""
    a, b = matrix("normal", 5, 2065, DTYPES[kind], 26), matrix("normal", 7, 2065, DTYPES[kind], 27)
    check(a, b.t(), None, arch, kind)
    check(a, b.t(), addend("opposite", a.float() @ b.float().t(), 28), arch, kind)


@pytest.mark.parametrize(("arch", "kind"), WIDE_RANGE)
def test_every_magnitude(arch: str, kind: str) -> None:
    """From products that vanish to products that overflow: the guard's limits lie in between."""
    a, b = ordinary(3, 20, torch.float32, 29), ordinary(5, 20, torch.float32, 30)
    cancelling = matrix("cancelling", 3, 20, torch.float32, 31)
    noise = addend("normal", torch.zeros(3, 5), 32)
    for exponent in range(-170, 130):
        half = exponent // 2
        right = (b * power(exponent - half)).to(DTYPES[kind]).t()
        sums, remainders = ((x * power(half)).to(DTYPES[kind]) for x in (a, cancelling))
        check(sums, right, None, arch, kind, prepared=False)
        # An addend that meets the sum, and one far above or below it.
        meets, apart = (noise * power(max(-126, min(126, e))) for e in (exponent, -exponent))
        check(remainders, right, meets, arch, kind, prepared=False)
        check(sums, right, apart, arch, kind, prepared=False)


@every_core
def test_groups_of_every_magnitude(arch: str, kind: str) -> None:
    """The exponent differs from one piece of K to the next, up and down, with whole gaps of 0."""
    dtype = DTYPES[kind]
    reach = {"bf16": 60, "tf32": 60, "fp16": 6, "e4m3": 3, "e5m2": 6}[kind]
    g = torch.Generator().manual_seed(33)
    for piece in (1, 4, 16, 32):
        exponents = torch.randint(-reach, reach + 1, (12, -(-160 // piece)), generator=g)
        powers = (exponents + 127 << 23).to(torch.int32).view(torch.float32)
        powers = torch.where(torch.rand(powers.shape, generator=g) < 0.3, 0.0, powers)
        powers = powers.repeat_interleave(piece, 1)[:, :160]
        a = (ordinary(12, 160, torch.float32, 34) * powers).to(dtype)
        b = (ordinary(12, 160, torch.float32, 35) * powers.flip(0)).to(dtype).t()
        check(a, b, None, arch, kind)
        check(a, b, addend("wide", torch.zeros(12, 12), 36), arch, kind)


@pytest.mark.parametrize(
    ("arch", "kind", "partner"),
    [(*unit, 0) for unit in TENSOR_CORES] + [(*unit, -40) for unit in WIDE_RANGE],
)
def test_one_awkward_factor_in_ordinary_data(arch: str, kind: str, partner: int) -> None:
    """A special value anywhere changes its own row or column and no other.

    Its partners are around 2^partner: beside small ones no exponent gives an infinity away.
    """
    dtype, how = DTYPES[kind], {"arch": arch, "precision": PRECISION.get(kind)}
    m, n, k = 33, 70, 131
    a, b = ordinary(m, k, dtype, 37), ordinary(n, k, dtype, 38)
    small_a, small_b = ((x.float() * power(partner)).to(dtype) for x in (a, b))
    c = addend("normal", torch.zeros(m, n), 39)
    clean_a = by_steps(a, small_b.t(), c, arch, kind)
    clean_b = by_steps(small_a, b.t(), c, arch, kind)
    g = torch.Generator().manual_seed(40)
    for value in specials(dtype).view(dtype):
        i, j = somewhere(a, g)
        bad, want = a.clone(), clean_a.clone()
        bad[i, j] = value
        want[i] = by_steps(bad[i : i + 1], small_b.t(), c[i : i + 1], arch, kind)[0]
        assert_same_bits(matmul(bad, small_b.t(), c, **how), want)
        i, j = somewhere(b, g)
        bad, want = b.clone(), clean_b.clone()
        bad[i, j] = value
        want[:, i] = by_steps(small_a, bad[i : i + 1].t(), c[:, i : i + 1], arch, kind)[:, 0]
        assert_same_bits(matmul(small_a, bad.t(), c, **how), want)
        assert_same_bits(matmul(small_a, prepare(bad.t(), **how), c, **how), want)


@every_core
def test_one_awkward_addend_in_ordinary_data(arch: str, kind: str) -> None:
    dtype, how = DTYPES[kind], {"arch": arch, "precision": PRECISION.get(kind)}
    a, b = ordinary(33, 131, dtype, 37), ordinary(70, 131, dtype, 38).t()
    c = addend("normal", torch.zeros(33, 70), 39)
    clean = by_steps(a, b, c, arch, kind)
    assert_same_bits(matmul(a, b, c, **how), clean)
    g = torch.Generator().manual_seed(41)
    for value in specials(torch.float32).view(torch.float32):
        i, j = somewhere(c, g)
        bad, want = c.clone(), clean.clone()
        bad[i, j] = value
        row, column, start = a[i : i + 1], b[:, j : j + 1], bad[i : i + 1, j : j + 1]
        want[i, j] = by_steps(row, column, start, arch, kind)[0, 0]
        assert_same_bits(matmul(a, b, bad, **how), want)


def somewhere(x: Tensor, g: torch.Generator) -> tuple[int, int]:
    rows, columns = x.shape
    place = int(torch.randint(0, rows * columns, (), generator=g))
    return divmod(place, columns)


@every_core
def test_shapes_and_kinds_at_random(arch: str, kind: str) -> None:
    @settings(max_examples=60, derandomize=True, deadline=None, database=None)
    @given(
        left=st.sampled_from(KINDS),
        right=st.sampled_from(KINDS),
        third=st.sampled_from((None, *ADDENDS)),
        m=st.integers(1, 40),
        n=st.integers(1, 60),
        k=st.integers(1, 100),
        seed=st.integers(0, 2**20),
    )
    def at_random(
        left: str, right: str, third: str | None, m: int, n: int, k: int, seed: int
    ) -> None:
        a = matrix(left, m, k, DTYPES[kind], seed)
        b = matrix(right, n, k, DTYPES[kind], seed + 1).t()
        c = None if third is None else addend(third, a.float() @ b.float(), seed + 2)
        check(a, b, c, arch, kind)

    at_random()


def refuse(*_: object, **__: object) -> Tensor:
    raise AssertionError("the exact path was taken")


@every_core
def test_ordinary_data_never_needs_the_exact_path(
    arch: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"arch": arch, "precision": PRECISION.get(kind)}
    a, b = ordinary(64, 256, DTYPES[kind], 41), ordinary(96, 256, DTYPES[kind], 42).t()
    want = by_steps(a, b, None, arch, kind)
    monkeypatch.setattr(tensor_core, "dot_add", refuse)
    assert_same_bits(matmul(a, b, **how), want)
    weight = prepare(b, **how)
    assert_same_bits(matmul(a, weight, **how), want)
    assert_same_bits(matmul(a[:1], weight, **how), want[:1])


@every_core
@pytest.mark.parametrize("awkward", [float("inf"), float("nan")])
def test_special_values_go_to_the_exact_path(
    arch: str, kind: str, awkward: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = ordinary(4, 32, DTYPES[kind], 43), ordinary(5, 32, DTYPES[kind], 44).t()
    if kind == "e4m3" and awkward == float("inf"):
        awkward = float("nan")  # it has no infinity
    a[2, 3] = awkward
    monkeypatch.setattr(tensor_core, "dot_add", refuse)
    with pytest.raises(AssertionError, match="the exact path was taken"):
        matmul(a, b, arch=arch, precision=PRECISION.get(kind))


@pytest.mark.gpu
@pytest.mark.parametrize("factor", KINDS)
@pytest.mark.parametrize(("arch", "kind"), UNITS)
def test_the_gpu_gives_the_same_bits(arch: str, kind: str, factor: str, cuda: torch.device) -> None:
    how = {"arch": arch, "precision": PRECISION.get(kind)}
    a, b = matrix(factor, 70, 147, DTYPES[kind], 45), matrix(factor, 129, 147, DTYPES[kind], 46).t()
    for c in (None, addend("normal", torch.zeros(70, 129), 47)):
        want = matmul(a, b, c, **how)
        on_gpu = None if c is None else c.to(cuda)
        assert_same_bits(matmul(a.to(cuda), b.to(cuda), on_gpu, **how), want)
        assert_same_bits(by_steps(a.to(cuda), b.to(cuda), on_gpu, arch, kind), want)
