"""Addition to the residual stream alone, where no norm follows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .checks import adjacent, check_dtype, check_runs, check_shape

_GRAIN = 1024  # elements of a program: 8 a thread, read in one piece


@triton.jit
def _add(
    x_ptr, residual_ptr, out_ptr,  # [T, D] x 3
    T, D,
    stride_x, stride_residual, stride_out,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    inside = (rows < T) & (cols < D)
    x = tl.load(x_ptr + rows * stride_x + cols, mask=inside, other=0.0)
    residual = tl.load(residual_ptr + rows * stride_residual + cols, mask=inside, other=0.0)
    # The compiler may add in the 16-bit type: the same bits, see norm.py.
    total = (x.to(tl.float32) + residual.to(tl.float32)).to(out_ptr.dtype.element_ty)  # RN, RN
    tl.store(out_ptr + rows * stride_out + cols, total, mask=inside)


def add(  # [T, D], [T, D] -> [T, D]
    x: Tensor, residual: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Return x + residual, added in fp32 and rounded once to the dtype.

    x, residual: one dtype, bf16 or fp16, any row stride. out: where to write, maybe x or residual.
    Raises TypeError or ValueError for what does not fit.
    """
    check_dtype(x=x, residual=residual)
    if x.dim() != 2 or not adjacent(x):
        raise ValueError(
            f"x: expected [T, D] with adjacent columns, found {list(x.shape)} with strides "
            f"{list(x.stride())}"
        )
    check_shape("residual", residual, x.shape, x.dtype)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    check_shape("out", out, x.shape, x.dtype)
    check_runs(_add, x, residual, out)
    if out.numel():
        height, width = x.shape
        block_d = min(triton.next_power_of_2(width), _GRAIN)
        block_t = min(triton.next_power_of_2(height), _GRAIN // block_d)
        with launch.on(x.device):
            _add[(triton.cdiv(height, block_t), triton.cdiv(width, block_d))](
                x, residual, out,
                height, width,
                x.stride(0), residual.stride(0), out.stride(0),
                BLOCK_T=block_t, BLOCK_D=block_d, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return out
