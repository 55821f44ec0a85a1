"""A 64-bit fingerprint of a row that any device can sum in any order."""

from __future__ import annotations

import torch
from torch import Tensor

from bitassay.reference.floats import bits, canonical_nan
from bitassay.reference.spec.dtypes import require_dtype

_GOLDEN_RATIO = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed 64-bit integer


def fingerprint_rows(x: Tensor) -> Tensor:  # [R, ...] -> [R]
    """Return each row's fingerprint: int64 that hold the bits of a uint64.

    x: fp32, bf16 or fp16; a row of several dimensions, [heads, head_dim], is flattened. Element i
    contributes mix((i + 1) << 32 | bits), where NaN counts as the canonical one; contributions are
    summed modulo 2^64, so their order is free. Raises ValueError where there are no rows, [D] or
    [], and TypeError for another dtype.
    """
    if x.dim() < 2:
        raise ValueError(f"expected rows [R, D] or [R, heads, head_dim], found {list(x.shape)}")
    x = x.flatten(1)
    facts = require_dtype("result", x.dtype)
    pattern = bits(canonical_nan(x).contiguous()).long() & (1 << facts.bits) - 1
    index = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=torch.int64) << 32
    return _mix(index | pattern).sum(1)


def fold(fingerprints: Tensor) -> Tensor:  # [R] -> []
    """Return one fingerprint of a sequence of rows; that of no rows is 0."""
    rank = torch.arange(1, len(fingerprints) + 1, device=fingerprints.device)
    return _mix(fingerprints + rank * _GOLDEN_RATIO).sum()


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser (Steele, Lea and Flood, 2014) on int64 as unsigned bits."""
    x = (x ^ _shift_right(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift_right(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, count: int) -> Tensor:
    return x >> count & (1 << 64 - count) - 1  # logical: int64 >> would copy the sign
