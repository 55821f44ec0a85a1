"""The comparison that every other test trusts."""

from __future__ import annotations

import pytest
import torch

from support.same_bits import assert_same_bits, from_patterns, patterns


def test_equal_bits_pass() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e5m2, torch.int64):
        x = torch.arange(6).view(2, 3).to(dtype)
        assert_same_bits(x, x.clone())
        assert_same_bits(x.t(), x.t().contiguous())
    nan = from_patterns([0x7FC00001], torch.float32)
    assert_same_bits(nan, nan.clone())


def test_the_first_difference_is_shown() -> None:
    got = torch.ones(5, 30)
    want = got.clone()
    got.view(torch.int32)[3, 17] += 1
    got[4, 2] = 2.0
    with pytest.raises(
        AssertionError, match=r"^\[3, 17\]: got 0x3f800001, want 0x3f800000 \(2 of 150 differ\)$"
    ):
        assert_same_bits(got, want)


@pytest.mark.parametrize(
    ("got", "want", "message"),
    [
        ([0x0000], [0x8000], "got 0x0000, want 0x8000"),
        ([0x7FFF], [0x7FC0], "got 0x7fff, want 0x7fc0"),
    ],
)
def test_equal_values_of_other_bits_fail(got: list[int], want: list[int], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_same_bits(from_patterns(got, torch.bfloat16), from_patterns(want, torch.bfloat16))


def test_other_shapes_and_dtypes_fail() -> None:
    with pytest.raises(AssertionError, match=r"got shape \[2, 3\], want \[3, 2\]"):
        assert_same_bits(torch.ones(2, 3), torch.ones(3, 2))
    with pytest.raises(AssertionError, match="float32.*float64"):
        assert_same_bits(torch.ones(2), torch.ones(2).double())


def test_patterns_are_unsigned_and_come_back() -> None:
    values = [0, 1, 0x7FFF, 0x8000, 0xFFFF]
    assert patterns(from_patterns(values, torch.float16)) == values
