"""Fingerprints of rows and of sequences against Python integers."""

from __future__ import annotations

import re
from math import prod

import pytest
import torch

from bitassay.reference.fingerprint import fingerprint_rows, fold
from support.hard_matrices import KINDS, matrix
from support.naive import tensor_core as twin
from support.same_bits import from_patterns, patterns

FORMATS = {torch.bfloat16: twin.BF16, torch.float16: twin.FP16, torch.float32: twin.FP32}
every_dtype = pytest.mark.parametrize("dtype", list(FORMATS))


def test_the_published_vector() -> None:
    row = torch.tensor([[1.0, -2.0, torch.nan]], dtype=torch.bfloat16)
    assert patterns(fingerprint_rows(row)) == [0x78B36F173A2C3AC6]
    assert twin.fingerprint([0x3F80, 0xC000, 0x7FC0], twin.BF16) == 0x78B36F173A2C3AC6


@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_their_fold(kind: str, dtype: torch.dtype) -> None:
    for rows, columns in ((1, 1), (7, 64), (3, 1001)):
        x = matrix(kind, rows, columns, dtype, 1)
        want = [twin.fingerprint(patterns(row), FORMATS[dtype]) for row in x]
        got = fingerprint_rows(x)
        assert got.dtype == torch.int64
        assert patterns(got) == want
        assert patterns(fingerprint_rows(x.t().contiguous().t())) == want
        assert patterns(fingerprint_rows(x[-1:])) == want[-1:]
        assert patterns(fold(got)[None]) == [twin.fold(want)]


@every_dtype
@pytest.mark.parametrize("shape", [(5, 4, 8), (3, 6, 6), (2, 2, 3, 4), (0, 4, 8), (3, 0, 2)])
def test_a_row_of_several_dimensions_is_flattened(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Square rows as well, whose columns could be taken for the rows' elements."""
    x = matrix("patterns", shape[0], prod(shape[1:]), dtype, 6)
    want = [twin.fingerprint(patterns(row), FORMATS[dtype]) for row in x]
    got = fingerprint_rows(x.view(shape))
    assert got.shape == shape[:1]
    assert patterns(got) == want
    if shape[0] and len(shape) == 3:  # heads that lie apart
        apart = x.view(shape).transpose(0, 1).contiguous().transpose(0, 1)
        assert patterns(fingerprint_rows(apart)) == want


@pytest.mark.parametrize("shape", [(), (3,)])
def test_what_has_no_rows_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"found {list(shape)}")):
        fingerprint_rows(torch.zeros(shape))


@every_dtype
def test_any_nan_counts_as_the_canonical_one(dtype: torch.dtype) -> None:
    fmt = FORMATS[dtype]
    quiet = fmt.infinity(False) | 1 << (fmt.fraction_bits - 1)
    sign = 1 << (fmt.width - 1)
    rows = [[0, v, 1] for v in (fmt.nan, quiet, fmt.infinity(False) + 1, fmt.nan | sign)]
    prints = [patterns(fingerprint_rows(from_patterns(row, dtype)[None])) for row in rows]
    assert prints == [[twin.fingerprint(rows[0], fmt)]] * 4


def test_one_bit_one_place_or_one_more_zero_shows() -> None:
    row = matrix("normal", 1, 50, torch.bfloat16, 2)
    flipped, swapped = row.clone(), row.clone()
    flipped.view(torch.int16)[0, 17] ^= 1
    swapped[0, 3], swapped[0, 4] = row[0, 4], row[0, 3]
    longer = torch.cat([row, torch.zeros(1, 1, dtype=torch.bfloat16)], 1)
    found = {fingerprint_rows(x).item() for x in (row, flipped, swapped, longer, -row)}
    assert len(found) == 5


def test_a_fold_depends_on_the_order_of_rows() -> None:
    prints = fingerprint_rows(matrix("normal", 3, 5, torch.float32, 3))
    folds = {fold(x).item() for x in (prints, prints.flip(0), prints[:2], prints[1:])}
    assert len(folds) == 4


def test_nothing_folds_to_zero() -> None:
    none = fold(torch.zeros(0, dtype=torch.int64))
    assert none.dtype == torch.int64
    assert none.shape == ()
    assert none.item() == 0


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(TypeError, match="float64"):
        fingerprint_rows(torch.zeros(1, 2, dtype=torch.float64))


@pytest.mark.gpu
@every_dtype
def test_the_gpu_gives_the_same_bits(dtype: torch.dtype, cuda: torch.device) -> None:
    x = matrix("patterns", 64, 4097, dtype, 4)
    want = fingerprint_rows(x)
    got = fingerprint_rows(x.to(cuda))
    assert patterns(got) == patterns(want)
    assert patterns(fold(got)[None]) == patterns(fold(want)[None])
