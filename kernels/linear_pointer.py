"""Matrix product through pointers: any strides, any architecture, a batch of products at once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitassay.kernels.device import is_interpreted
from bitassay.kernels.matmul_epilogue import finish, place
from bitassay.kernels.tiles import GROUP, Tile

_MAX_BATCH = 65_535  # of a grid's second axis
_UNIT = 8  # elements that one 16-byte load brings; Triton itself notices multiples of 16 alone


# `steps` is never specialised: were the loop known to run once, the compiler would feed the bias
# into tl.dot as its accumulator, which rounds elsewhere.
@triton.jit(do_not_specialize=["steps"])
def _linear_pointer(
    x_ptr, w_ptr, bias_ptr, out_ptr,  # [B, M, K], [B, N, K], [N], [B, M, N]
    M, N, K, steps, vocab_size,
    stride_xb, stride_xm, stride_xk, stride_wb, stride_wn, stride_wk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    UNIT: tl.constexpr, SWAP: tl.constexpr, WHOLE_K: tl.constexpr, HAS_BIAS: tl.constexpr,
    PADDED: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    # K and the strides between rows count units, so that the compiler knows what divides them.
    K, stride_xb, stride_xm = K * UNIT, stride_xb * UNIT, stride_xm * UNIT
    stride_wb, stride_wn = stride_wb * UNIT, stride_wn * UNIT
    row, col = place(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    batch = tl.program_id(1).to(tl.int64)
    rows = row * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = col * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K).to(tl.int64)
    # Columns beyond N read the last one again: no mask is cheaper, and nothing of it is stored.
    # Rows beyond M are masked: at M = 1 they would be 15 of 16 rows read.
    x_rows = batch * stride_xb + rows.to(tl.int64) * stride_xm
    w_rows = batch * stride_wb + tl.minimum(cols, N - 1).to(tl.int64) * stride_wn
    if SWAP:  # weight [N, K] @ x [K, M]
        x_ptrs = x_ptr + x_rows[None, :] + ks[:, None] * stride_xk
        w_ptrs = w_ptr + w_rows[:, None] + ks[None, :] * stride_wk
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:  # x [M, K] @ weight [K, N]
        x_ptrs = x_ptr + x_rows[:, None] + ks[None, :] * stride_xk
        w_ptrs = w_ptr + w_rows[None, :] + ks[:, None] * stride_wk
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for step in range(steps):  # K ascending: the order of the contract
        k = step * BLOCK_K
        if SWAP:
            x_mask = (rows < M)[None, :]
            if WHOLE_K:
                w = tl.load(w_ptrs)
            else:
                x_mask = x_mask & (ks < K - k)[:, None]
                w = tl.load(w_ptrs, mask=(ks < K - k)[None, :], other=0.0)
            x = tl.load(x_ptrs, mask=x_mask, other=0.0)
            acc = tl.dot(w, x, acc, input_precision="ieee")
        else:
            x_mask = (rows < M)[:, None]
            if WHOLE_K:
                w = tl.load(w_ptrs)
            else:
                x_mask = x_mask & (ks < K - k)[None, :]
                w = tl.load(w_ptrs, mask=(ks < K - k)[:, None], other=0.0)
            x = tl.load(x_ptrs, mask=x_mask, other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_xk
        w_ptrs += BLOCK_K * stride_wk
    if SWAP:
        acc = tl.trans(acc)
    acc = finish(acc, bias_ptr, cols, N, vocab_size, HAS_BIAS, PADDED, IEEE)
    out_ptr += (batch * M + row * BLOCK_M) * N + col * BLOCK_N
    out_rows = tl.arange(0, BLOCK_M).to(tl.int64) * N
    out_ptrs = out_ptr + out_rows[:, None] + tl.arange(0, BLOCK_N)[None, :]
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)  # RN: second and last


def linear_pointer(
    x: Tensor,  # [B, M, K]
    weight: Tensor,  # [B, N, K]
    bias: Tensor | None,  # [N]
    out: Tensor,  # [B, M, N], contiguous
    vocab_size: int,
    tile: Tile,
) -> None:
    """Write x @ weight.mT + bias to out; x and weight of any strides."""
    (count, m, k), n = x.shape, weight.shape[1]
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    rows = (*x.stride()[:2], *weight.stride()[:2])
    if count == 1:
        rows = (0, rows[1], 0, rows[3])
    adjacent = x.stride(2) == 1 and weight.stride(2) == 1
    unit = _UNIT if adjacent and not any(size % _UNIT for size in (k, *rows)) else 1
    xb, xm, wb, wn = (stride // unit for stride in rows)
    for b in range(0, count, _MAX_BATCH):
        some = slice(b, b + _MAX_BATCH)
        _linear_pointer[(tiles, min(count - b, _MAX_BATCH))](
            x[some], weight[some], bias, out[some],
            m, n, k // unit, triton.cdiv(k, tile.block_k), vocab_size,
            xb, xm, x.stride(2), wb, wn, weight.stride(2),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP=GROUP,
            UNIT=unit, SWAP=tile.swap, WHOLE_K=k % tile.block_k == 0, HAS_BIAS=bias is not None,
            PADDED=vocab_size < n, IEEE=x.dtype == torch.float32,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
        )  # fmt: skip


INTERPRETED = is_interpreted(_linear_pointer)
