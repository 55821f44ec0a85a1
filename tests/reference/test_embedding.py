"""Embedding copies bits, whatever they mean."""

from __future__ import annotations

import pytest
import torch

from bitassay.reference.embedding import embedding
from support.hard_matrices import matrix
from support.same_bits import assert_same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_copied(dtype: torch.dtype) -> None:
    weight = matrix("patterns", 37, 12, dtype, 1)  # NaN payloads too
    ids = torch.tensor([0, 36, 5, 5, 17, 0])
    want = torch.stack([weight[i].view(torch.uint8) for i in ids.tolist()]).view(dtype)
    assert_same_bits(embedding(ids, weight), want)
    assert_same_bits(embedding(ids, weight.t().contiguous().t()), want)
    wide = matrix("patterns", 74, 24, dtype, 1)
    wide[::2, 1::2] = weight
    assert_same_bits(embedding(ids, wide[::2, 1::2]), want)
    for i in range(len(ids)):
        assert_same_bits(embedding(ids[i : i + 1], weight), want[i : i + 1])


def test_no_tokens() -> None:
    got = embedding(torch.zeros(0, dtype=torch.int64), torch.ones(3, 4))
    assert got.shape == (0, 4)


def test_the_result_is_a_copy() -> None:
    weight = torch.ones(3, 4)
    embedding(torch.tensor([1]), weight).zero_()
    assert_same_bits(weight, torch.ones(3, 4))


@pytest.mark.parametrize("bad", [-1, 37, 2**40])
def test_ids_outside_the_vocabulary_are_named(bad: int) -> None:
    weight = torch.ones(37, 2)
    with pytest.raises(ValueError, match=rf"id {bad} at position 2.*0 to 36"):
        embedding(torch.tensor([0, 36, bad, -5]), weight)
