"""SwiGLU's activation: the gate through silu, times the other half."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitassay.kernels.checks import adjacent, check_runs, check_shape
from bitassay.kernels.device import on_device
from bitassay.kernels.elementary import silu
from bitassay.reference.spec.dtypes import require_dtype

_GRAIN = 1024  # elements of a program: 8 a thread, read in one piece


@triton.jit
def _silu_and_mul(
    x_ptr, out_ptr,  # [T, 2 * F], [T, F]
    T, F,
    stride_x, stride_out,
    BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    inside = (rows < T) & (cols < F)
    source = x_ptr + rows * stride_x + cols
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + F, mask=inside, other=0.0).to(tl.float32)
    result = (silu(gate) * up).to(out_ptr.dtype.element_ty)  # RN, RN
    tl.store(out_ptr + rows * stride_out + cols, result, mask=inside)


def silu_and_mul(gate_up: Tensor, *, out: Tensor | None = None) -> Tensor:  # [T, 2 * F] -> [T, F]
    """Return silu(gate) * up, where gate is the first half of each row and up the second.

    gate_up: bf16 or fp16, any row stride; computed in fp32 and rounded once. out: where to write,
    any row stride. Raises TypeError or ValueError for another dtype or an odd width.
    """
    require_dtype("transformer", gate_up=gate_up.dtype)
    if gate_up.dim() != 2 or gate_up.shape[1] % 2 or not adjacent(gate_up):
        raise ValueError(
            f"expected [T, 2 * F] with adjacent columns, found {list(gate_up.shape)} with strides "
            f"{list(gate_up.stride())}"
        )
    height, width = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = torch.empty(height, width, dtype=gate_up.dtype, device=gate_up.device)
    check_shape("out", out, (height, width), gate_up.dtype)
    check_runs(_silu_and_mul, gate_up, out)
    if out.numel():
        block_f = min(triton.next_power_of_2(width), _GRAIN)
        block_t = min(triton.next_power_of_2(height), _GRAIN // block_f)
        with on_device(gate_up.device):
            _silu_and_mul[(triton.cdiv(height, block_t), triton.cdiv(width, block_f))](
                gate_up, out,
                height, width,
                gate_up.stride(0), out.stride(0),
                BLOCK_T=block_t, BLOCK_F=block_f, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return out
