"""The tensor core against the slow twin, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitassay.reference.spec.arch import get_arch
from bitassay.reference.tensor_core import dot_add, matmul, tensor_core
from support.hard_matrices import ADDENDS, KINDS, addend, matrix, specials
from support.naive import tensor_core as twin
from support.same_bits import assert_same_bits, from_patterns, patterns

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "fp32": torch.float32,
}
CORES = [(arch, kind) for arch, kinds in twin.STEPS.items() for kind in kinds]
UNITS = CORES + [(arch, "fp32") for arch in twin.STEPS]


def distinct(units: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Leave out a core that is another architecture's, here and there: it would run again."""
    found = {}
    for arch, kind in units:
        core = None if kind == "fp32" else tensor_core(get_arch(arch), DTYPES[kind])
        found[kind, twin.STEPS[arch].get(kind), core] = arch, kind
    return list(found.values())


PRECISION = {"tf32": "tf32", "fp32": "ieee"}


def exact(examples: int) -> settings:
    """The same cases in every run: a failure here must be reproducible by anyone."""
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None)


def stored(fmt: twin.Format, dtype: torch.dtype) -> st.SearchStrategy[int]:
    """Patterns of one format: special values, any at all, and a narrow band of exponents."""
    width = fmt.width
    mask = (1 << width) - 1
    pool = sorted(value & mask for value in specials(dtype).tolist())
    shift = fmt.fraction_bits + fmt.dropped
    band = st.builds(
        lambda sign, near, fraction: (sign << (width - 1) | (fmt.bias + near) << shift) + fraction,
        st.integers(0, 1),
        st.integers(-2, 2),
        st.integers(0, (1 << shift) - 1),
    )
    return st.one_of(band, st.sampled_from(pool), st.integers(0, mask))


@st.composite
def one_step(draw: st.DrawFn, arch: str, kind: str) -> tuple[list[int], list[int], int]:
    fmt, group = twin.FORMATS[kind], twin.STEPS[arch][kind].group
    size = draw(st.integers(1, group))
    values = st.lists(stored(fmt, DTYPES[kind]), min_size=size, max_size=size)
    c = draw(stored(twin.FP32, torch.float32))
    return draw(values), draw(values), c


@pytest.mark.parametrize(("arch", "kind"), distinct(CORES))
def test_one_step(arch: str, kind: str) -> None:
    """With a result in fp32 and in fp16."""
    fmt, core = twin.FORMATS[kind], twin.STEPS[arch][kind]
    model = tensor_core(get_arch(arch), DTYPES[kind])
    # Operands of the step are tf32 already; cutting fp32 down to it is matmul's work.
    cut = (1 << 32) - (1 << fmt.dropped)

    @exact(120)
    @given(one_step(arch, kind))
    def check(case: tuple[list[int], list[int], int]) -> None:
        a, b, c = case
        left, right = (from_patterns([x & cut for x in v], DTYPES[kind]) for v in (a, b))
        start = from_patterns([c], torch.float32).squeeze(0)
        for out in (torch.float32, torch.float16):
            want = twin.step(a, b, c, fmt, core, half_output=out == torch.float16)
            got = dot_add(left, right, start, model, out)
            assert_same_bits(got, from_patterns([want], out).squeeze(0))

    check()


def product(a: Tensor, b: Tensor, c: Tensor | None, kind: str, arch: str) -> Tensor:
    """[M, K], [K, N], [M, N] -> [M, N], by the twin."""
    rows, columns = a.shape[0], b.shape[1]
    left = [patterns(a[m]) for m in range(rows)]
    right = [patterns(b[:, n]) for n in range(columns)]
    start = [0] * (rows * columns) if c is None else patterns(c)
    values = [
        twin.output(left[m], right[n], start[m * columns + n], kind, arch)
        for m in range(rows)
        for n in range(columns)
    ]
    return from_patterns(values, torch.float32).view(rows, columns)


@pytest.mark.parametrize(("arch", "kind"), distinct(UNITS))
def test_matmul(arch: str, kind: str) -> None:
    """K up to two groups and a ragged tail; factors and addend of every kind."""
    dtype, precision = DTYPES[kind], PRECISION.get(kind)
    group = 8 if kind == "fp32" else twin.STEPS[arch][kind].group

    @exact(100)
    @given(
        left=st.sampled_from(KINDS),
        right=st.sampled_from(KINDS),
        third=st.sampled_from((None, *ADDENDS)),
        depth=st.integers(1, 3 * group),
        rows=st.integers(1, 3),
        columns=st.integers(1, 5),
        seed=st.integers(0, 2**20),
    )
    def check(
        left: str, right: str, third: str | None, depth: int, rows: int, columns: int, seed: int
    ) -> None:
        a = matrix(left, rows, depth, dtype, seed)
        b = matrix(right, columns, depth, dtype, seed + 1).t()
        c = None
        if third is not None:
            c = addend(third, a.float() @ b.float(), seed + 2)
        got = matmul(a, b, c, arch=arch, precision=precision)
        assert_same_bits(got, product(a, b, c, kind, arch))

    check()


@pytest.mark.parametrize("factor", KINDS)
@pytest.mark.parametrize(("arch", "kind"), UNITS)
def test_matmul_of_every_kind(arch: str, kind: str, factor: str) -> None:
    """Both factors of one kind: this is where cancellation and ties meet their partners."""
    dtype, precision = DTYPES[kind], PRECISION.get(kind)
    a, b = matrix(factor, 4, 37, dtype, 1), matrix(factor, 6, 37, dtype, 2).t()
    got = matmul(a, b, arch=arch, precision=precision)
    assert_same_bits(got, product(a, b, None, kind, arch))


@pytest.mark.parametrize(("arch", "kind"), UNITS)
def test_every_pair_of_special_values(arch: str, kind: str) -> None:
    """All products of two special values, alone and added to every special c."""
    dtype, precision = DTYPES[kind], PRECISION.get(kind)
    pool = specials(dtype).view(dtype)
    a, b = pool[:, None], pool[None, :]
    assert_same_bits(matmul(a, b, arch=arch, precision=precision), product(a, b, None, kind, arch))
    for value in specials(torch.float32).view(torch.float32):
        c = value.expand(len(pool), len(pool)).contiguous()
        got = matmul(a, b, c, arch=arch, precision=precision)
        assert_same_bits(got, product(a, b, c, kind, arch))


@pytest.mark.parametrize("kind", ["bf16", "tf32"])  # products of fp16 stay far above the floor
@pytest.mark.parametrize("arch", list(twin.STEPS))
def test_the_exponent_floor_shows(arch: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It decides bits only where c is 0 and all products lie below it, around 2^-140."""
    dtype, precision = DTYPES[kind], PRECISION.get(kind)
    core = twin.STEPS[arch][kind]
    a, b = (matrix("small", 36, core.group, dtype, seed) * 2.0**-11 for seed in (3, 4))
    want = product(a, b.t(), None, kind, arch)
    assert_same_bits(matmul(a, b.t(), arch=arch, precision=precision), want)
    for floor in (core.floor - 1, core.floor + 1):
        monkeypatch.setitem(twin.STEPS[arch], kind, replace(core, floor=floor))
        assert not torch.equal(product(a, b.t(), None, kind, arch), want)
