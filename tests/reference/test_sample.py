"""Greedy choice, top k and margin against sorting in plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitassay.reference.sample import greedy, margin_ulps, top_k
from support.hard_matrices import matrix, specials
from support.naive import tensor_core as twin
from support.same_bits import assert_same_bits, from_patterns, patterns

FORMATS = {torch.bfloat16: twin.BF16, torch.float16: twin.FP16, torch.float32: twin.FP32}
every_dtype = pytest.mark.parametrize("dtype", list(FORMATS))


def pool_without_nan(dtype: torch.dtype) -> list[int]:
    values = patterns(specials(dtype).view(dtype))
    return sorted({v for v in values if twin.decode(v, FORMATS[dtype]).kind != "nan"})


def check(row: list[int], dtype: torch.dtype) -> None:
    fmt, logits = FORMATS[dtype], from_patterns(row, dtype)[None]
    assert greedy(logits).tolist() == twin.top_k(row, 1, fmt)
    for k in {1, 2, 8, len(row) - 1, len(row)} & set(range(1, len(row) + 1)):
        values, ids = top_k(logits, k)
        want = twin.top_k(row, k, fmt)
        assert ids.dtype == torch.int64
        assert ids[0].tolist() == want
        assert_same_bits(values[0], from_patterns([row[i] for i in want], dtype))
    if len(row) > 1:
        assert margin_ulps(logits).tolist() == [twin.margin(row, fmt)]


@every_dtype
def test_rows_full_of_ties_and_special_values(dtype: torch.dtype) -> None:
    fmt = FORMATS[dtype]
    one = fmt.bias << fmt.fraction_bits
    near = st.integers(one - 2, one + 2)
    value = st.one_of(st.sampled_from(pool_without_nan(dtype)), near, near.map(lambda v: v | sign))
    sign = 1 << (fmt.width - 1)

    @settings(max_examples=300, derandomize=True, deadline=None, database=None)
    @given(st.lists(value, min_size=1, max_size=20))
    def rows(row: list[int]) -> None:
        check(row, dtype)

    rows()


@every_dtype
def test_every_order_of_every_two_special_values(dtype: torch.dtype) -> None:
    pool = pool_without_nan(dtype)
    for first in pool:
        for second in pool:
            check([first, second], dtype)


@every_dtype
def test_a_large_vocabulary(dtype: torch.dtype) -> None:
    """Random rows of bf16 tie at the top; each row is judged by itself."""
    logits = matrix("normal", 12, 5001, dtype, 1)
    logits[3] = 0.0
    logits[4, ::2] = -0.0
    logits[5] = -torch.inf
    fmt = FORMATS[dtype]
    rows = [patterns(row) for row in logits]
    values, ids = top_k(logits, 8)
    assert ids.tolist() == [twin.top_k(row, 8, fmt) for row in rows]
    assert_same_bits(values, logits.gather(1, ids))
    assert greedy(logits).tolist() == [twin.top_k(row, 1, fmt)[0] for row in rows]
    assert margin_ulps(logits).tolist() == [twin.margin(row, fmt) for row in rows]
    assert_same_bits(greedy(logits.t().contiguous().t()), greedy(logits))


def test_zeros_of_either_sign_are_equal() -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0]])
    assert greedy(logits).tolist() == [1, 1]
    assert top_k(logits, 3)[1].tolist() == [[1, 2, 0], [1, 2, 0]]
    assert margin_ulps(logits).tolist() == [0, 0]


def test_margin_counts_in_the_dtype_of_the_logits() -> None:
    logits = torch.tensor([[1.0, 1.0 + 2.0**-7]])
    assert margin_ulps(logits).item() == 1 << 16
    assert margin_ulps(logits.to(torch.bfloat16)).item() == 1
    assert margin_ulps(logits.to(torch.float16)).item() == 8


@every_dtype
def test_nan_is_an_error_that_says_where(dtype: torch.dtype) -> None:
    logits = torch.zeros(4, 9).to(dtype)
    logits[2, 7] = logits[2, 8] = logits[3, 0] = torch.nan
    for choose in (greedy, margin_ulps, lambda x: top_k(x, 3)):
        with pytest.raises(ValueError, match=r"NaN.*row 2.*id 7"):
            choose(logits)


@pytest.mark.parametrize("k", [0, -1, 10])
def test_k_that_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k = {k} .*1 … 9"):
        top_k(torch.zeros(2, 9), k)


def test_a_margin_needs_two_logits() -> None:
    with pytest.raises(ValueError, match="2"):
        margin_ulps(torch.zeros(2, 1))
