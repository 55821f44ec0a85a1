"""A 64-bit fingerprint of every row, summed on the device in whatever order it likes.

Each element adds splitmix64's finaliser (Steele, Lea and Flood, 2014) of its place and its bits;
a sum of integers modulo 2^64 has no order, so a row may be cut anywhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitassay.kernels.device import check_device, is_interpreted, on_device
from bitassay.kernels.fingerprint_into import fingerprint_into as fingerprint_into
from bitassay.kernels.hash import mix
from bitassay.reference.spec.dtypes import require_dtype

_GRAIN = 8192  # elements a program mixes; in the emulator few programs are quicker than many
EMULATED_GRAIN = 1 << 18


@triton.jit
def _fingerprint_rows(
    x_ptr, out_ptr,  # [R, D], [R] zeros
    R, D,
    stride_r, stride_d,
    INFINITY: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (rows < R)[:, None] & (cols < D)[None, :]
    pointers = x_ptr + rows[:, None] * stride_r + cols[None, :] * stride_d
    pattern = tl.load(pointers, mask=inside, other=0).to(tl.int64) & ((1 << WIDTH) - 1)
    quiet: tl.constexpr = (1 << (WIDTH - 1)) - 1
    pattern = tl.where((pattern & quiet) > INFINITY, quiet, pattern)  # every NaN counts alike
    mixed = mix(((cols[None, :] + 1) << 32) | pattern)
    row_sums = tl.sum(tl.where(inside, mixed.to(tl.int64), 0), axis=1)
    tl.atomic_add(out_ptr + rows, row_sums, mask=rows < R)


def fingerprint_rows(x: Tensor, columns: int | None = None) -> Tensor:  # [R, D] -> [R]
    """Return each row's fingerprint: int64 that hold the bits of a uint64.

    x: fp32, bf16 or fp16, any strides. columns: only the first so many count, which leaves out a
    padded vocabulary. Raises TypeError or ValueError for other dtypes or shapes.
    """
    facts = require_dtype("result", x.dtype)
    if x.dim() != 2 or not 0 <= (x.shape[1] if columns is None else columns) <= x.shape[1]:
        raise ValueError(f"expected [R, D] and columns within D, found {list(x.shape)}, {columns}")
    interpreted = is_interpreted(_fingerprint_rows)
    check_device(interpreted, x.device)
    height, width = x.shape[0], x.shape[1] if columns is None else columns
    out = torch.zeros(height, dtype=torch.int64, device=x.device)
    if height == 0 or width == 0:
        return out
    grain = EMULATED_GRAIN if interpreted else _GRAIN
    block_d = min(triton.next_power_of_2(width), grain // 2)
    block_r = min(triton.next_power_of_2(height), grain // block_d)
    grid = (triton.cdiv(height, block_r), triton.cdiv(width, block_d))
    with on_device(x.device):
        _fingerprint_rows[grid](
            x.view(facts.integer), out,
            height, width,
            *x.stride(),
            INFINITY=facts.last_number, WIDTH=facts.bits,
            BLOCK_R=block_r, BLOCK_D=block_d,
            num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@triton.jit
def _fold(rows_ptr, out_ptr, R, stride_r, BLOCK_R: tl.constexpr):  # [R], [1] zeros
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    prints = tl.load(rows_ptr + rows * stride_r, mask=rows < R, other=0).to(tl.uint64)
    mixed = mix(prints + (rows + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
    tl.atomic_add(out_ptr, tl.sum(tl.where(rows < R, mixed.to(tl.int64), 0), axis=0))


def fold(fingerprints: Tensor) -> Tensor:  # [R] -> []
    """Return one fingerprint of a sequence of rows; that of no rows is 0."""
    if fingerprints.dtype != torch.int64 or fingerprints.dim() != 1:
        found = f"{fingerprints.dtype} {list(fingerprints.shape)}"
        raise ValueError(f"expected int64 [R], found {found}")
    check_device(is_interpreted(_fold), fingerprints.device)
    count = fingerprints.shape[0]
    out = torch.zeros(1, dtype=torch.int64, device=fingerprints.device)
    if count:
        with on_device(fingerprints.device):
            _fold[(triton.cdiv(count, 1024),)](
                fingerprints, out, count, fingerprints.stride(0),
                BLOCK_R=1024, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return out[0]
