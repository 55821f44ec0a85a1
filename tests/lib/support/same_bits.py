"""Comparison of tensors by their bits, never with a tolerance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    """Fail with the first differing coordinate unless dtype, shape and every bit are equal."""
    assert got.dtype == want.dtype, f"got {got.dtype}, want {want.dtype}"
    assert got.shape == want.shape, f"got shape {list(got.shape)}, want {list(want.shape)}"
    integer = _INT[got.element_size()]
    left, right = got.detach().cpu().view(integer), want.detach().cpu().view(integer)
    if torch.equal(left, right):
        return
    different = left != right
    at = tuple(different.nonzero()[0].tolist())
    digits, mask = 2 * got.element_size(), (1 << 8 * got.element_size()) - 1
    values = [f"0x{int(x[at]) & mask:0{digits}x}" for x in (left, right)]
    count = f"{int(different.sum())} of {different.numel()} differ"
    raise AssertionError(f"{list(at)}: got {values[0]}, want {values[1]} ({count})")


def patterns(x: Tensor) -> list[int]:
    """The stored bits of every element, flat, as unsigned Python integers."""
    mask = (1 << 8 * x.element_size()) - 1
    flat = x.detach().cpu().contiguous().view(_INT[x.element_size()]).flatten()
    return [value & mask for value in flat.tolist()]


def from_patterns(values: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A flat tensor of dtype with the given stored bits."""
    integer = _INT[dtype.itemsize]
    half = 1 << (8 * dtype.itemsize - 1)
    signed = [value - 2 * half if value >= half else value for value in values]
    return torch.tensor(signed, dtype=integer).view(dtype)
