"""Fingerprints of many tensors in one launch: those of `fingerprint_rows`, each in its slot."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bitassay.kernels import fingerprint_into as module
from bitassay.kernels.fingerprint import fingerprint_rows
from bitassay.kernels.fingerprint_into import MOST, Shape, fingerprint_into, shape_for
from bitassay.reference import fingerprint as reference
from support.hard_matrices import matrix
from support.same_bits import assert_same_bits, from_patterns
from support.strided import loose

pytestmark = pytest.mark.usefixtures("interpreting")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
UNTOUCHED = 0x5EED


def slots_of(rows: int, slots: int, seed: int) -> Tensor:
    """A permutation's beginning, every fifth row dropped."""
    g = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(slots, generator=g)[:rows]
    chosen[torch.arange(rows) % 5 == 3] = -1
    return chosen


def expected(
    rows: Sequence[Tensor], columns: Sequence[int], slots: Tensor, shape: tuple[int, int]
) -> Tensor:
    out = torch.full(shape, UNTOUCHED, dtype=torch.int64)
    kept = (slots >= 0).nonzero().flatten()
    for x, column in zip(rows, columns, strict=True):
        out[slots[kept], column] = reference.fingerprint_rows(x.contiguous())[kept]
    return out


def check(rows: Sequence[Tensor], shape: Shape | None = None) -> None:
    count = rows[0].shape[0]
    slots = slots_of(count, count + 9, count)
    columns = [2 + 3 * ((5 * i + 1) % len(rows)) for i in range(len(rows))]  # no order of its own
    if len(set(columns)) < len(rows):
        columns = list(range(len(rows), 0, -1))
    out = torch.full((count + 9, max(columns) + 3), UNTOUCHED, dtype=torch.int64)
    fingerprint_into(rows, out, columns, slots, shape=shape)
    assert_same_bits(out, expected(rows, columns, slots, tuple(out.shape)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 7, 300])
def test_rows_of_many_tensors(count: int, dtype: torch.dtype) -> None:
    widths = (64, 1, 37, 96, 2, 130, 33)
    rows = [matrix("patterns", count, width, dtype, i) for i, width in enumerate(widths)]
    for x in rows[:3]:
        x[0, 0] = torch.nan
    check(rows)
    check(rows[:4:3])  # even widths alone


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_every_pattern(dtype: torch.dtype) -> None:
    x = from_patterns(range(1 << 16), dtype).view(4, -1)
    check([x])
    check([x[:, 1:]])  # the same with rows that begin between words
    assert_same_bits(fingerprint_rows(x), reference.fingerprint_rows(x))


def test_patterns_around_infinity() -> None:
    edges = [0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0, 1]
    x = from_patterns([e | s for e in edges for s in (0, 1 << 31)], torch.float32)
    check([x[None], x[None, 3:]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [Shape(1, 16, 1), Shape(1, 32, 2), Shape(4, 16, 4), Shape(16, 64, 4)]
)
def test_no_launch_changes_a_bit(shape: Shape, dtype: torch.dtype) -> None:
    """Rows of less than a tile, of whole tiles, and of some tiles and a rest."""
    widths = (1, 31, 32, 62, 64, 65, 256, 333)
    check([matrix("patterns", 5, width, dtype, width) for width in widths], shape)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_parts(dtype: torch.dtype) -> None:
    x = matrix("patterns", 9, 60, dtype, 1)
    check([loose(x, 0, 4), loose(x, 0, 3), x[:, :40], x[:, 3:20], x[:1].expand(9, -1)])
    check([x[::2], x[1::2][[0, 1, 2, 3, 0]]])


def test_in_the_emulator(gpu_emulation: str) -> None:
    check([matrix("patterns", 6, width, DTYPES[width % 3], width) for width in (40, 41, 42, 76)])


def test_dtypes_mixed_and_more_than_a_launch_takes() -> None:
    rows = [
        matrix("patterns", 5, 10 + i, DTYPES[i % 3 if i > 2 * MOST else 0], i)
        for i in range(2 * MOST + 7)
    ]
    check(rows)


@pytest.mark.parametrize("count", [0, 5])
def test_nothing_to_do(count: int) -> None:
    out = torch.full((4, 3), UNTOUCHED, dtype=torch.int64)
    dropped = torch.full((count,), -1)
    fingerprint_into([matrix("normal", count, 8, torch.bfloat16, 1)], out, [1], dropped)
    fingerprint_into([], out, [], dropped)
    assert out.eq(UNTOUCHED).all()


def test_no_columns_sum_to_zero() -> None:
    out = torch.full((2, 2), UNTOUCHED, dtype=torch.int64)
    some = torch.ones(2, 4).bfloat16()
    fingerprint_into([some[:, :0], some], out, [0, 1], torch.tensor([1, 0]))
    assert out[:, 0].tolist() == [0, 0]
    assert_same_bits(out[:, 1].contiguous(), reference.fingerprint_rows(some))


def test_slots_outside_are_skipped_and_strides_are_free() -> None:
    rows = [matrix("normal", 4, 24, torch.bfloat16, 1)]
    slots = torch.tensor([[5, 2, -7, 0], [1, 1, 1, 1]]).t()[:, 0]
    whole = torch.full((6, 5), UNTOUCHED, dtype=torch.int64)
    out = whole.t()[1:4, :5]  # [3, 5], columns further apart than rows
    fingerprint_into(rows, out, [4], slots)
    want = torch.full((6, 5), UNTOUCHED, dtype=torch.int64)
    prints = reference.fingerprint_rows(rows[0])
    want.t()[1:4, :5][[2, 0], 4] = prints[[1, 3]]
    assert_same_bits(whole, want)


@pytest.mark.parametrize("count", [1, 2, 64, 65, 5000])
@pytest.mark.parametrize("words", [0, 1, 32, 100, 512, 2048, 14336, 151_936])
def test_launches_fill_their_threads(count: int, words: int) -> None:
    shape = shape_for(count, words)
    lanes = 32 * shape.warps
    assert shape.rows * shape.words >= lanes
    assert shape.rows * shape.words // lanes <= 16  # what registers hold
    assert shape.words <= max(32, 2 * words - 1)


def test_what_does_not_fit_is_refused() -> None:
    x, out, slots = torch.ones(2, 4), torch.zeros(3, 2, dtype=torch.int64), torch.tensor([0, 1])
    with pytest.raises(TypeError, match="out and slots int64, found torch.int32"):
        fingerprint_into([x], out.int(), [0], slots)
    with pytest.raises(TypeError, match="found torch.int64 and torch.int32"):
        fingerprint_into([x], out, [0], slots.int())
    with pytest.raises(TypeError, match=r"expected .* found rows\[1\] torch.float64"):
        fingerprint_into([x, x.double()], out, [0, 1], slots)
    with pytest.raises(ValueError, match=r"out \[S, O\] and slots \[R\]"):
        fingerprint_into([x], out[0], [0], slots)
    for columns in ([0, 0], [0], [0, 2], [-1, 0]):
        with pytest.raises(ValueError, match="2 distinct columns below 2"):
            fingerprint_into([x, x], out, columns, slots)
    for bad in (x[:1], x.t()[:2].t().t(), x[0]):
        with pytest.raises(ValueError, match=r"rows\[0\]: expected \[2, D\] of adjacent columns"):
            fingerprint_into([bad], out, [0], slots)
    assert not out.any()


def test_excess_is_that_of_zeros() -> None:
    zeros = torch.zeros(1, 300)
    whole, part = (int(reference.fingerprint_rows(z)) for z in (zeros, zeros[:, :77]))
    assert module._excess(77, 300) == (whole - part + (1 << 63)) % (1 << 64) - (1 << 63)
