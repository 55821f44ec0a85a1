"""The halving tree against its twin, which sees the same tree from the root."""

from __future__ import annotations

import pytest
import torch

from bitassay.reference.floats import canonical_nan
from bitassay.reference.tree import tree_sum
from support.hard_matrices import matrix
from support.naive import operations as op
from support.same_bits import assert_same_bits, from_patterns, patterns

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 31, 64, 65, 100, 127, 129)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("kind", ["normal", "wide", "cancelling", "huge", "subnormal", "special"])
def test_equals_the_twin(kind: str, n: int) -> None:
    x = matrix(kind, 4, n, torch.float32, seed=n)
    want = [op.tree_sum(patterns(row)) for row in x]
    assert_same_bits(canonical_nan(tree_sum(x)), from_patterns(want, torch.float32))


def test_the_pairs_are_i_and_i_plus_a_half() -> None:
    """1e8 and -1e8 meet first only where they stand half the width apart."""
    big = 1e8
    assert tree_sum(torch.tensor([big, 1.0, -big, 1.0])) == 2.0
    assert tree_sum(torch.tensor([big, -big, 1.0, 1.0])) == 0.0
    # Width 8, of which the last three are padding: 0 with 4, 1 with 5 …
    assert tree_sum(torch.tensor([big, 1.0, 1.0, 1.0, -big])) == 3.0
    assert tree_sum(torch.tensor([big, 1.0, 1.0, -big, 1.0])) == 0.0


def test_zeros_may_follow_without_a_change() -> None:
    """Padding to a wider power of two than needed changes nothing: a kernel may do it."""
    x = matrix("cancelling", 6, 100, torch.float32, seed=3)
    wider = torch.nn.functional.pad(x, (0, 924))
    assert_same_bits(tree_sum(wider), tree_sum(x))


def test_leading_axes_stay() -> None:
    x = matrix("normal", 6, 11, torch.float32, seed=4)
    assert_same_bits(tree_sum(x.view(2, 3, 11)), tree_sum(x).view(2, 3))
    assert_same_bits(tree_sum(x.t().contiguous().t()), tree_sum(x))
    assert tree_sum(x[:0]).shape == (0,)
