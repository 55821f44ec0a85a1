"""Keys and values into the paged cache: copies of rows to the slots they are given, no arithmetic.

A slot outside the cache cannot raise on a device without waiting for it. Nothing is stored for it
and a flag is set, which `check` reads at the end of a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitassay.kernels.checks import adjacent
from bitassay.kernels.device import check_device, check_same_device, is_interpreted, on_device
from bitassay.kernels.flags import Flag
from bitassay.reference.spec.dtypes import require_dtype

BLOCK_SIZE = 16  # tokens of a cache block
_OUTSIDE = Flag()


@triton.jit
def _write(
    k_ptr, v_ptr, slots_ptr,  # [T, H, D], [T, H, D], [T]
    k_cache_ptr, v_cache_ptr, flag_ptr,  # [B, SIZE, H, D] x 2, [1]
    BLOCKS, H,
    k_t, k_h, v_t, v_h, stride_s, k_block, k_slot, k_head, v_block, v_slot, v_head,
    D: tl.constexpr, SIZE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token * stride_s).to(tl.int64)
    block, offset = slot // SIZE, slot % SIZE
    valid = (slot >= 0) & (block < BLOCKS)
    heads = tl.arange(0, BLOCK_H).to(tl.int64)[:, None]
    cols = tl.arange(0, BLOCK_D)[None, :]
    inside = (heads < H) & (cols < D) & valid
    k = tl.load(k_ptr + token * k_t + heads * k_h + cols, mask=inside, other=0)
    v = tl.load(v_ptr + token * v_t + heads * v_h + cols, mask=inside, other=0)
    k_row = k_cache_ptr + block * k_block + offset * k_slot
    v_row = v_cache_ptr + block * v_block + offset * v_slot
    tl.store(k_row + heads * k_head + cols, k, mask=inside)
    tl.store(v_row + heads * v_head + cols, v, mask=inside)
    shown = tl.minimum(tl.maximum(slot, -2147483648), 2147483647)
    place = (token << 32) | (shown & 0xFFFFFFFF)
    tl.atomic_min(flag_ptr, place, mask=(valid == 0) & (slot != -1))


def write(  # [T, Hkv, D], [T, Hkv, D], [B, 16, Hkv, D], [B, 16, Hkv, D], [T] -> None
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> None:
    """Copy row t of k and v to slot slots[t] = block * 16 + offset; -1 stores nothing.

    All of one dtype, bf16 or fp16, any strides but adjacent columns; slots int64, none twice.
    For a slot outside -1 … 16 * B - 1 nothing is stored, and `check` raises. Raises TypeError or
    ValueError for what does not fit.
    """
    facts = require_dtype(
        "transformer", k=k.dtype, v=v.dtype, k_cache=k_cache.dtype, v_cache=v_cache.dtype
    )
    _check(k, v, k_cache, v_cache, slots)
    check_same_device(k, v, k_cache, v_cache, slots)
    check_device(is_interpreted(_write), k.device)
    tokens, heads, width = k.shape
    if k.numel() == 0:
        return
    with on_device(k.device):
        _write[(tokens,)](
            k.view(facts.integer), v.view(facts.integer), slots,
            k_cache.view(facts.integer), v_cache.view(facts.integer), _OUTSIDE.on(k.device),
            k_cache.shape[0], heads,
            *k.stride()[:2], *v.stride()[:2], slots.stride(0),
            *k_cache.stride()[:3], *v_cache.stride()[:3],
            D=width, SIZE=BLOCK_SIZE,
            BLOCK_H=triton.next_power_of_2(heads), BLOCK_D=triton.next_power_of_2(width),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


def check() -> None:
    """Wait for the device and raise ValueError for the first slot outside the cache since last."""
    first = _OUTSIDE.take()
    if first is not None:
        raise ValueError(
            f"row {first[0]}: slot {first[1]} is outside the cache: nothing was stored, so discard "
            "this step and check the block tables"
        )


def _check(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    if slots.dtype != torch.int64:
        raise TypeError(f"expected slots int64, found {slots.dtype}")
    shape = (*k_cache.shape[:1], BLOCK_SIZE, *k.shape[1:])  # of a cache
    fits = k_cache.shape == v_cache.shape == shape and slots.shape == k.shape[:1]
    if k.dim() != 3 or k.shape != v.shape or not fits:
        raise ValueError(
            f"expected k and v [T, Hkv, D], caches [B, {BLOCK_SIZE}, Hkv, D] and slots [T], found "
            + ", ".join(str(list(t.shape)) for t in (k, v, k_cache, v_cache, slots))
        )
    for name, x in (("k", k), ("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        if not adjacent(x):
            raise ValueError(f"{name}: expected adjacent columns, found strides {list(x.stride())}")
