"""Rotary position embedding: each head's halves turned by an angle that grows with the position."""

from __future__ import annotations

import torch
from torch import Tensor

from bitassay.reference.floats import fma, round_to
from bitassay.reference.spec.dtypes import require_dtype


def apply(  # [T, Hq, D], [T, Hkv, D], [T], [P, D / 2], [P, D / 2] -> [T, Hq, D], [T, Hkv, D]
    q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """Return q and k turned to their positions.

    q, k: bf16 or fp16, one dtype. positions: integers within 0 … P-1. cos, sin: fp32 tables of
    `rotary_table.RotaryTable`. Raises TypeError or ValueError for what does not fit.
    """
    require_dtype("transformer", q=q.dtype, k=k.dtype)
    half = cos.shape[-1]
    if sin.shape != cos.shape or any(
        x.dim() != 3 or x.shape[::2] != (len(positions), 2 * half) for x in (q, k)
    ):
        raise ValueError(
            f"expected q and k [{len(positions)}, heads, {2 * half}] for positions "
            f"{list(positions.shape)} and tables {list(cos.shape)}, found {list(q.shape)} and "
            f"{list(k.shape)}"
        )
    outside = (positions < 0) | (positions >= len(cos))
    if outside.any():
        row = int(outside.nonzero()[0])
        raise ValueError(
            f"row {row}: position {int(positions[row])} is outside the tables' 0 … {len(cos) - 1}: "
            "the sequence is longer than max_position_embeddings"
        )
    cos, sin = cos[positions, None], sin[positions, None]  # [T, 1, D / 2]
    return _turn(q, cos, sin), _turn(k, cos, sin)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat(
        [
            fma(first, cos, -(second * sin)),  # RN the product, RN the rest
            fma(second, cos, first * sin),
        ],
        dim=-1,
    )
    return round_to(turned, x.dtype)  # RN
