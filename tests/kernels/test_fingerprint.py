"""Fingerprints in the interpreter: the definition, the reference, and no order."""

from __future__ import annotations

import pytest
import torch

from bitassay.kernels import fingerprint as module
from bitassay.kernels.fingerprint import fingerprint_rows, fold
from bitassay.reference import fingerprint as reference
from support.hard_matrices import matrix
from support.same_bits import assert_same_bits, patterns

pytestmark = pytest.mark.usefixtures("interpreting")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WORD = (1 << 64) - 1


def mix(x: int) -> int:
    """splitmix64's finaliser in Python integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB & WORD
    return x ^ x >> 31


def by_definition(row: torch.Tensor) -> int:
    nan = 0x7FFFFFFF if row.dtype == torch.float32 else 0x7FFF
    bits = [nan if value != value else u for value, u in zip(row, patterns(row), strict=True)]
    return sum(mix((i + 1) << 32 | u) for i, u in enumerate(bits)) & WORD


def test_vector() -> None:
    row = torch.tensor([[1, -2, float("nan")]]).bfloat16()
    assert int(fingerprint_rows(row)) & WORD == 0x78B36F173A2C3AC6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 33), (17, 300)])
def test_definition_and_reference(rows: int, columns: int, dtype: torch.dtype) -> None:
    x = matrix("patterns", rows, columns, dtype, rows)
    x[0, 0] = torch.nan
    got = fingerprint_rows(x)
    assert patterns(got) == [by_definition(row) for row in x]
    assert_same_bits(got, reference.fingerprint_rows(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_are_not_nan(dtype: torch.dtype) -> None:
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, -torch.nan, 0.0, -0.0]], dtype=dtype)
    assert patterns(fingerprint_rows(x)) == [by_definition(x[0])]


@pytest.mark.parametrize("grain", [4, 64, 1 << 20])
def test_a_row_may_be_cut_anywhere(grain: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EMULATED_GRAIN", grain)
    x = matrix("patterns", 5, 37, torch.bfloat16, 1)
    assert_same_bits(fingerprint_rows(x), reference.fingerprint_rows(x))


def test_strides_and_columns() -> None:
    x = matrix("patterns", 6, 40, torch.float32, 2)
    assert_same_bits(fingerprint_rows(x.t()), reference.fingerprint_rows(x.t().contiguous()))
    assert_same_bits(fingerprint_rows(x, 37), reference.fingerprint_rows(x[:, :37].contiguous()))
    assert_same_bits(fingerprint_rows(x, 0), torch.zeros(6, dtype=torch.int64))
    assert fingerprint_rows(x[:0]).shape == (0,)


def test_one_changed_bit_or_place_shows() -> None:
    x = torch.zeros(3, 50).bfloat16()
    x[1, 7], x[2, 8] = -0.0, -0.0
    assert len(set(fingerprint_rows(x).tolist())) == 3


@pytest.mark.parametrize("count", [0, 1, 2, 1500])
def test_fold(count: int) -> None:
    prints = torch.randint(-(1 << 62), 1 << 62, (2 * count,), dtype=torch.int64)[::2]
    total = sum(
        mix(f + (r + 1) * 0x9E3779B97F4A7C15 & WORD) for r, f in enumerate(patterns(prints))
    )
    got = fold(prints)
    assert got.shape == ()
    assert int(got) & WORD == total & WORD
    assert_same_bits(got, reference.fold(prints))


def test_what_does_not_fit_is_refused() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(TypeError, match="torch.float64"):
        fingerprint_rows(x.double())
    with pytest.raises(ValueError, match=r"\[R, D\]"):
        fingerprint_rows(x[0])
    for columns in (-1, 5):
        with pytest.raises(ValueError, match=f"columns within D, found .*{columns}"):
            fingerprint_rows(x, columns)
    with pytest.raises(ValueError, match="expected int64"):
        fold(x[0])
