"""Greedy choice, top k and margin on the device: the reference's, and NaN told afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bitassay.kernels import sample
from bitassay.kernels.flags import Flag
from bitassay.reference import sample as reference
from support.hard_matrices import matrix
from support.same_bits import assert_same_bits, from_patterns

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = ("normal", "ties", "wide", "subnormal", "sparse")


@pytest.fixture(autouse=True)
def clear_flag() -> Iterator[None]:
    yield
    sample._NANS.take()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_reference(kind: str, dtype: torch.dtype) -> None:
    logits = matrix(kind, 20, 50, dtype, 1)
    logits[3], logits[4, ::2] = -torch.inf, torch.inf
    assert_same_bits(sample.greedy(logits), reference.greedy(logits))
    for k in (1, 2, 8, 50):
        for got, want in zip(sample.top_k(logits, k), reference.top_k(logits, k), strict=True):
            assert_same_bits(got, want)
    assert_same_bits(sample.margin_ulps(logits), reference.margin_ulps(logits))
    sample.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_decide_is_all_three(dtype: torch.dtype) -> None:
    logits = matrix("ties", 20, 50, dtype, 2)
    values, ids, margins = sample.decide(logits, 8)
    assert_same_bits(values, reference.top_k(logits, 8)[0])
    assert_same_bits(ids, reference.top_k(logits, 8)[1])
    assert_same_bits(ids[:, 0].contiguous(), reference.greedy(logits))
    assert_same_bits(margins, reference.margin_ulps(logits))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_are_equal_and_the_lowest_id_wins(dtype: torch.dtype) -> None:
    logits = torch.tensor([[-1.0, -0.0, 0.0], [-1.0, 0.0, -0.0]]).to(dtype)
    assert sample.greedy(logits).tolist() == [1, 1]
    assert sample.top_k(logits, 3)[1].tolist() == [[1, 2, 0], [1, 2, 0]]
    assert sample.margin_ulps(logits).tolist() == [0, 0]


def test_margin_counts_representable_values() -> None:
    row = from_patterns([0x8001, 0x0002], torch.bfloat16)[None]  # the zeros between count once
    assert sample.margin_ulps(row).tolist() == [3]
    row = from_patterns([0xFF80, 0x7F80], torch.bfloat16)[None]  # from -inf to inf
    assert sample.margin_ulps(row).tolist() == [2 * 0x7F80]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("negative", [False, True])
def test_nan_is_named_afterwards(dtype: torch.dtype, negative: bool) -> None:
    logits = torch.zeros(5, 9).to(dtype)
    logits[2, 6] = logits[2, 8] = logits[4, 0] = -torch.nan if negative else torch.nan
    for function in (sample.greedy, sample.margin_ulps, lambda x: sample.top_k(x, 3)):
        function(logits)
        with pytest.raises(ValueError, match="row 2, first at id 6"):
            sample.check()
        sample.check()  # told once


def test_a_flag_of_ones_own() -> None:
    flag = Flag()
    logits = torch.zeros(2, 9)
    logits[1, 3] = torch.nan
    sample.decide(logits, 2, nans=flag, first_row=10)
    sample.decide(logits, 2, nans=flag, first_row=4)
    sample.check()
    assert flag.take() == (5, 3)
    assert flag.take() is None


def test_what_does_not_fit_is_refused() -> None:
    logits = torch.zeros(2, 4)
    for k in (0, 5):
        with pytest.raises(ValueError, match=f"k = {k} is not within 1 … 4"):
            sample.top_k(logits, k)
    with pytest.raises(ValueError, match="k = 2 is not within 1 … 1"):
        sample.margin_ulps(logits[:, :1])
    with pytest.raises(ValueError, match=r"logits \[T, V\]"):
        sample.greedy(logits[0])
    with pytest.raises(ValueError, match="V at least 1"):
        sample.greedy(logits[:, :0])
    with pytest.raises(TypeError, match="torch.float64"):
        sample.greedy(logits.double())
