"""RMSNorm and the addition to the residual stream, together or alone, one pass over each row.

Only exact operations: fp32 products, the halving tree, division and square root to nearest-even,
one conversion. So rows a program and warps change no bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitassay.kernels.checks import adjacent, check_runs, check_shape
from bitassay.kernels.device import on_device
from bitassay.kernels.tree import tree_sum
from bitassay.reference.spec.dtypes import require_dtype

MAX_WIDTH = 16384  # what a program can hold in registers


class Shape(NamedTuple):
    """How many rows a program takes, and how many warps it has; it never changes a bit."""

    rows: int
    warps: int


def shape_for(count: int, width: int) -> Shape:
    """Return the launch for so many rows: 8 to 32 elements a thread, few programs too small."""
    padded = triton.next_power_of_2(width)
    if padded >= 1024:
        return Shape(1, min(16, max(4, padded // 512)))
    return Shape(2048 // max(padded, 128) if count >= 2048 else 512 // max(padded, 128), 4)


_GRAIN = 1024  # elements of a program: 8 a thread, read in one piece


@triton.jit
def _rms_norm(
    x_ptr, residual_ptr, weight_ptr,  # [T, H, D], [T, H, D] or None, [D]
    out_ptr, sum_ptr,  # [T, H, D], [T, H, D] or None
    R, H, eps,  # R = T * H
    x_t, x_h, residual_t, residual_h, stride_w, out_t, out_h, sum_t, sum_h,
    D: tl.constexpr, PADDED: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    t, h = (row // H).to(tl.int64)[:, None], (row % H).to(tl.int64)[:, None]
    cols = tl.arange(0, PADDED)[None, :]
    inside = (row < R)[:, None] & (cols < D)
    x = tl.load(x_ptr + t * x_t + h * x_h + cols, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(
            residual_ptr + t * residual_t + h * residual_h + cols, mask=inside, other=0.0
        )
        # The compiler may add in the 16-bit type: one rounding of the exact sum is the same as two,
        # the first to 24 bits, since 24 >= 2 * 11 + 2 (and sums below the normal range are exact).
        total = (x + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)  # RN, RN
        tl.store(sum_ptr + t * sum_t + h * sum_h + cols, total, mask=inside)
        x = total.to(tl.float32)
    weight = tl.load(weight_ptr + cols * stride_w, mask=cols < D, other=0.0).to(tl.float32)
    size = tl.full((ROWS,), D, tl.float32)
    mean = tl.div_rn(tree_sum(x * x), size)  # by D, not times 1 / D
    rms = tl.sqrt_rn(mean + eps)
    normed = tl.div_rn(x, tl.broadcast_to(rms[:, None], (ROWS, PADDED))) * weight
    tl.store(
        out_ptr + t * out_t + h * out_h + cols, normed.to(out_ptr.dtype.element_ty), mask=inside
    )


def rms_norm(  # [..., D], [D] -> [..., D]
    x: Tensor, weight: Tensor, *, eps: float, out: Tensor | None = None, shape: Shape | None = None
) -> Tensor:
    """Return x / sqrt(mean(x**2) + eps) * weight, each step in fp32, rounded once to the dtype.

    x: [T, D], or [T, heads, D] with any strides but adjacent columns, as views of packed q and k
    have. x, weight: one dtype, bf16 or fp16, D from 1 to 16384. out: where to write, shaped as x;
    x itself is allowed. shape: another launch than the table's; it never changes a bit. Raises
    TypeError or ValueError for what does not fit.
    """
    return _launch(x, None, weight, eps, out, None, shape)[0]


def add_rms_norm(  # [T, D], [T, D], [D] -> [T, D], [T, D]
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float,
    out: Tensor | None = None,
    residual_out: Tensor | None = None,
    shape: Shape | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `rms_norm` of the new residual stream, and that stream: x + residual, rounded.

    out, residual_out: where to write; residual_out may be residual, out may be x. Otherwise as
    `rms_norm`.
    """
    require_dtype("transformer", x=x.dtype, residual=residual.dtype)
    check_shape("residual", residual, x.shape, x.dtype)
    if residual_out is None:
        residual_out = torch.empty(residual.shape, dtype=x.dtype, device=x.device)
    return _launch(x, residual, weight, eps, out, residual_out, shape)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    total: Tensor | None,
    shape: Shape | None,
) -> tuple[Tensor, Tensor]:
    require_dtype("transformer", x=x.dtype, weight=weight.dtype)
    if x.dim() not in (2, 3) or weight.shape != x.shape[-1:] or not adjacent(x):
        raise ValueError(
            "expected x [T, D] or [T, heads, D] with adjacent columns and weight [D], found "
            f"{list(x.shape)} with strides {list(x.stride())} and {list(weight.shape)}"
        )
    width = x.shape[-1]
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"expected rows of 1 … {MAX_WIDTH} elements, found {width}")
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    check_shape("out", out, x.shape, x.dtype)
    if total is not None:
        check_shape("residual_out", total, x.shape, x.dtype)
    check_runs(_rms_norm, x, residual, weight, out, total)
    heads = 1 if x.dim() == 2 else x.shape[1]
    count = x.shape[0] * heads
    if count:
        shape = shape or shape_for(count, width)
        strides = [s for t in (x, residual, weight, out, total) for s in _strides(t)]
        with on_device(x.device):
            _rms_norm[(triton.cdiv(count, shape.rows),)](
                x, residual, weight,
                out, total,
                count, heads, float(eps),
                *strides,
                D=width, PADDED=triton.next_power_of_2(width), ADD=residual is not None,
                ROWS=shape.rows, num_warps=shape.warps, enable_fp_fusion=False,
            )  # fmt: skip
    return out, out if total is None else total


def _strides(x: Tensor | None) -> tuple[int, ...]:
    """Return the strides of tokens and heads; of a weight, that of its elements."""
    if x is None:
        return (0, 0)
    return (x.stride(0), 0) if x.dim() == 2 else x.stride()[:-1] if x.dim() == 3 else x.stride()


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
    # The compiler may add in the 16-bit type: the same bits, see above.
    total = (x.to(tl.float32) + residual.to(tl.float32)).to(out_ptr.dtype.element_ty)  # RN, RN
    tl.store(out_ptr + rows * stride_out + cols, total, mask=inside)


def add(  # [T, D], [T, D] -> [T, D]
    x: Tensor, residual: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Return x + residual, added in fp32 and rounded once to the dtype.

    x, residual: one dtype, bf16 or fp16, any row stride. out: where to write, maybe x or residual.
    Raises TypeError or ValueError for what does not fit.
    """
    require_dtype("transformer", x=x.dtype, residual=residual.dtype)
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
        with on_device(x.device):
            _add[(triton.cdiv(height, block_t), triton.cdiv(width, block_d))](
                x, residual, out,
                height, width,
                x.stride(0), residual.stride(0), out.stride(0),
                BLOCK_T=block_t, BLOCK_D=block_d, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return out
