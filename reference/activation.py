"""SwiGLU's activation: the gate through silu, times the other half."""

from __future__ import annotations

import torch
from torch import Tensor

from bitassay.reference.elementary import silu
from bitassay.reference.floats import round_to


def silu_and_mul(gate_up: Tensor) -> Tensor:  # [T, 2 * F] -> [T, F]
    """Return silu(gate) * up, where gate is the first half of each row and up the second.

    gate_up: bf16 or fp16; computed in fp32 and rounded once to its dtype. Raises TypeError or
    ValueError for another dtype or an odd width.
    """
    if gate_up.dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"expected bfloat16 or float16, found {gate_up.dtype}")
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"expected [T, 2 * F], found {list(gate_up.shape)}")
    gate, up = gate_up.float().chunk(2, dim=1)
    return round_to(silu(gate) * up, gate_up.dtype)  # RN, RN
