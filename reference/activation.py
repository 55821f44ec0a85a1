"""SwiGLU's activation: the gate through silu, times the other half."""

from __future__ import annotations

from torch import Tensor

from bitassay.reference.elementary import silu
from bitassay.reference.floats import round_to
from bitassay.reference.spec.dtypes import require_dtype


def silu_and_mul(gate_up: Tensor) -> Tensor:  # [T, 2 * F] -> [T, F]
    """Return silu(gate) * up, where gate is the first half of each row and up the second.

    gate_up: bf16 or fp16; computed in fp32 and rounded once to its dtype. Raises TypeError or
    ValueError for another dtype or an odd width.
    """
    require_dtype("transformer", gate_up=gate_up.dtype)
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"expected [T, 2 * F], found {list(gate_up.shape)}")
    gate, up = gate_up.float().chunk(2, dim=1)
    return round_to(silu(gate) * up, gate_up.dtype)  # RN, RN
