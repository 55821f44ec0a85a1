"""Rotary position embedding: each head's halves turned by the angle of its position.

A position outside the tables cannot raise on a device without waiting for it. Its row becomes NaN
and a flag is set, which `check` reads at the end of a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitassay.kernels.checks import adjacent, check_runs, check_shape
from bitassay.kernels.device import on_device
from bitassay.kernels.flags import Flag
from bitassay.reference.spec.dtypes import require_dtype

_OUTSIDE = Flag()
_HEADS = 8  # a program turns at most so many heads of one token


@triton.jit
def _turn(
    x_ptr, out_ptr, heads, count, cos, sin, cols, stride_h, out_h,
    HALF: tl.constexpr,
):  # fmt: skip
    """Turn heads [BLOCK_H] of one token; cos and sin [1, BLOCK_D]."""
    inside = (heads < count)[:, None] & (cols < HALF)
    source = x_ptr + heads.to(tl.int64)[:, None] * stride_h + cols
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    turned = tl.fma(first, cos, (second * sin) * -1.0)  # an exact change of sign, zeros included
    raised = tl.fma(second, cos, first * sin)
    target = out_ptr + heads.to(tl.int64)[:, None] * out_h + cols
    tl.store(target, turned.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(target + HALF, raised.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rotary(
    q_ptr, k_ptr, positions_ptr, cos_ptr, sin_ptr,  # [T, Hq, D], [T, Hkv, D], [T], [P, D/2] x 2
    q_out_ptr, k_out_ptr, flag_ptr,  # [T, Hq, D], [T, Hkv, D], [1]
    HQ, HKV, P,
    q_t, q_h, k_t, k_h, stride_p, cos_p, sin_p, q_out_t, q_out_h, k_out_t, k_out_h,
    HALF: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    position = tl.load(positions_ptr + token * stride_p).to(tl.int64)
    inside = (position >= 0) & (position < P)
    row = tl.where(inside, position, 0)
    cols = tl.arange(0, BLOCK_D)[None, :]
    known, nan = inside & (cols < HALF), float("nan")
    cos = tl.load(cos_ptr + row * cos_p + cols, mask=known, other=nan)
    sin = tl.load(sin_ptr + row * sin_p + cols, mask=known, other=nan)
    cos = tl.broadcast_to(cos, (BLOCK_H, BLOCK_D))
    sin = tl.broadcast_to(sin, (BLOCK_H, BLOCK_D))
    heads = block * BLOCK_H + tl.arange(0, BLOCK_H)
    of_q = tl.cdiv(HQ, BLOCK_H)  # blocks of q come first, those of k after them
    if block < of_q:
        _turn(
            q_ptr + token * q_t, q_out_ptr + token * q_out_t, heads, HQ, cos, sin, cols,
            q_h, q_out_h, HALF,
        )  # fmt: skip
    else:
        _turn(
            k_ptr + token * k_t, k_out_ptr + token * k_out_t, heads - of_q * BLOCK_H, HKV,
            cos, sin, cols, k_h, k_out_h, HALF,
        )  # fmt: skip
    if block == 0:
        shown = tl.minimum(tl.maximum(position, -2147483648), 2147483647)
        place = (token << 32) | (shown & 0xFFFFFFFF)
        tl.atomic_min(flag_ptr, place, mask=inside == 0)


def apply(  # [T, Hq, D], [T, Hkv, D], [T], [P, D / 2], [P, D / 2] -> [T, Hq, D], [T, Hkv, D]
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return q and k turned to their positions, computed in fp32 and rounded once.

    q, k: bf16 or fp16, one dtype, any strides but adjacent columns, as views of a packed product
    have. positions: int64. cos, sin: fp32 tables of `rotary_table.RotaryTable`. out: where to
    write, with strides as free as those of q and k. The row of a position outside 0 … P-1 is NaN,
    and `check` raises for it. Raises TypeError or ValueError for what does not fit.
    """
    require_dtype("transformer", q=q.dtype, k=k.dtype)
    _check(q, k, positions, cos, sin)
    if out is None:
        out = _empty(q), _empty(k)
    q_out, k_out = out
    check_shape("out[0]", q_out, q.shape, q.dtype)
    check_shape("out[1]", k_out, k.shape, k.dtype)
    check_runs(_rotary, q, k, positions, cos, sin, q_out, k_out)
    (tokens, q_heads, _), k_heads, half = q.shape, k.shape[1], cos.shape[1]
    block = min(_HEADS, triton.next_power_of_2(max(q_heads, k_heads, 1)))
    programs = triton.cdiv(q_heads, block) + triton.cdiv(k_heads, block)
    if tokens and programs:
        with on_device(q.device):
            _rotary[(tokens, programs)](
                q, k, positions, cos, sin,
                q_out, k_out, _OUTSIDE.on(q.device),
                q_heads, k_heads, cos.shape[0],
                *q.stride()[:2], *k.stride()[:2], positions.stride(0), cos.stride(0),
                sin.stride(0), *q_out.stride()[:2], *k_out.stride()[:2],
                HALF=half, BLOCK_D=triton.next_power_of_2(half), BLOCK_H=block,
                num_warps=2, enable_fp_fusion=False,
            )  # fmt: skip
    return q_out, k_out


def _empty(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def check() -> None:
    """Wait for the device and raise ValueError for the first position outside since last."""
    first = _OUTSIDE.take()
    if first is not None:
        raise ValueError(
            f"row {first[0]}: position {first[1]} is outside the rotary tables: its row became "
            "NaN, so discard this step; the sequence is longer than max_position_embeddings"
        )


def _check(q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> None:
    if positions.dtype != torch.int64 or cos.dtype != torch.float32 or sin.dtype != torch.float32:
        raise TypeError(
            "expected positions int64 and cos and sin float32, found "
            f"{positions.dtype}, {cos.dtype} and {sin.dtype}"
        )
    if positions.dim() != 1 or cos.dim() != 2 or cos.shape != sin.shape or not cos.numel():
        raise ValueError(
            "expected positions [T] and cos and sin [P, D / 2], found "
            f"{list(positions.shape)}, {list(cos.shape)} and {list(sin.shape)}"
        )
    tokens, width = positions.shape[0], 2 * cos.shape[1]
    if any(x.dim() != 3 or x.shape[::2] != (tokens, width) for x in (q, k)):
        raise ValueError(
            f"expected q and k [{tokens}, heads, {width}], found {list(q.shape)} and "
            f"{list(k.shape)}"
        )
    for name, x in (("q", q), ("k", k), ("cos", cos), ("sin", sin)):
        if not adjacent(x):
            raise ValueError(f"{name}: expected adjacent columns, found strides {list(x.stride())}")
