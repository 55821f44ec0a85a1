"""Embedding: one row of the table per token, copied as integers.

A token id outside the table cannot raise on a device without waiting for it. Its row becomes NaN
and a flag is set, which `check` reads at the end of a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitassay.kernels.device import check_device, check_same_device, is_interpreted, on_device
from bitassay.kernels.flags import Flag
from bitassay.reference.spec.dtypes import require_dtype

_OUTSIDE = Flag()


@triton.jit
def _embedding(
    ids_ptr, weight_ptr, out_ptr, flag_ptr,  # [T], [V, H], [T, H], [1]
    T, V, H,
    stride_t, stride_v, stride_h, stride_out,
    NAN: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_H + tl.arange(0, BLOCK_H)
    ids = tl.load(ids_ptr + rows * stride_t, mask=rows < T, other=0).to(tl.int64)
    inside = (ids >= 0) & (ids < V)
    wanted = (rows < T)[:, None] & (cols < H)[None, :]
    source = weight_ptr + tl.where(inside, ids, 0)[:, None] * stride_v + cols[None, :] * stride_h
    values = tl.load(source, mask=wanted & inside[:, None], other=NAN)
    tl.store(out_ptr + rows[:, None] * stride_out + cols[None, :], values, mask=wanted)
    if tl.program_id(1) == 0:
        shown = tl.minimum(tl.maximum(ids, -2147483648), 2147483647)
        place = (rows << 32) | (shown & 0xFFFFFFFF)
        flags = flag_ptr + tl.zeros((BLOCK_T,), tl.int32)
        tl.atomic_min(flags, place, mask=(rows < T) & (inside == 0))


def embedding(  # [T], [V, H] -> [T, H]
    ids: Tensor, weight: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Return weight[ids]; no arithmetic, so no rounding.

    ids: int32 or int64 [T]. weight: bf16, fp16 or fp32, any strides. out: where to write, of the
    weight's dtype, with any row stride. The row of an id outside 0 … V-1 is NaN, and `check`
    raises for it. Raises TypeError or ValueError for other dtypes or shapes.
    """
    facts = require_dtype("weight", weight=weight.dtype)
    _check(ids, weight, out)
    check_device(is_interpreted(_embedding), weight.device)
    height, width = ids.shape[0], weight.shape[1]
    if out is None:
        out = torch.empty(height, width, dtype=weight.dtype, device=weight.device)
    if out.numel() == 0:
        return out
    block_h = min(triton.next_power_of_2(width), 1024)
    block_t = min(triton.next_power_of_2(height), max(1, 4096 // block_h))
    grid = (triton.cdiv(height, block_t), triton.cdiv(width, block_h))
    with on_device(weight.device):
        _embedding[grid](
            ids, weight.view(facts.integer), out.view(facts.integer), _OUTSIDE.on(weight.device),
            height, weight.shape[0], width,
            ids.stride(0), *weight.stride(), out.stride(0),
            NAN=facts.canonical_nan, BLOCK_T=block_t, BLOCK_H=block_h,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def check() -> None:
    """Wait for the device and raise ValueError for the first id outside the table since last."""
    first = _OUTSIDE.take()
    if first is not None:
        raise ValueError(
            f"token id {first[1]} at position {first[0]} is outside the embedding's table: its "
            "row became NaN, so discard this step and check the ids"
        )


def _check(ids: Tensor, weight: Tensor, out: Tensor | None) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"expected ids int32 or int64, found {ids.dtype}")
    if ids.dim() != 1 or weight.dim() != 2 or (ids.numel() and not weight.shape[0]):
        raise ValueError(
            f"expected ids [T] and weight [V, H], found {list(ids.shape)} and {list(weight.shape)}"
        )
    shape = (ids.shape[0], weight.shape[1])
    if out is not None and (
        out.dtype != weight.dtype or out.shape != shape or (out.numel() and out.stride(1) != 1)
    ):
        raise ValueError(
            f"out: expected {weight.dtype} {list(shape)} with adjacent columns, found {out.dtype} "
            f"{list(out.shape)} with strides {list(out.stride())}"
        )
    check_same_device(ids, weight, out)
