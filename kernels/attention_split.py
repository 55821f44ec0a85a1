"""Attention in one program per split of keys: few query rows over a long context.

A tile of query rows, a split and a slice of the values' columns make a program, which leaves
m, den and acc in fp32; a second kernel folds them, ascending. Rows with a single split end at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from bitassay.kernels import attention_steps as steps
from bitassay.kernels.attention_inputs import Inputs
from bitassay.kernels.attention_tiles import AttentionTile
from bitassay.kernels.device import is_interpreted

_MOST_EACH = 4  # tiles a sequence, up to which all have as many; beyond, a tile searches
_TOGETHER = tl.constexpr(4)  # splits whose loads the second kernel issues at once


@triton.jit(do_not_specialize=["R", "min_tokens", "max_tokens"])
def _attention_split(
    q_ptr, k_ptr, v_ptr, table_ptr, query_start_ptr, seq_lens_ptr, out_ptr,
    m_ptr, den_ptr, acc_ptr,  # [tiles, Hkv, splits, KEPT], the same, [.., KEPT, D]
    R, min_tokens, max_tokens,
    stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_table, stride_ot, stride_oh,
    SCALE: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
    SLICES: tl.constexpr, EACH: tl.constexpr, UNMASKED: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    DV: tl.constexpr = D // SLICES
    tile, split = tl.program_id(0), tl.program_id(2)
    head, columns = tl.program_id(1) // SLICES, tl.program_id(1) % SLICES * DV
    sequence, row, start, tokens, keys = steps.place(
        tile, query_start_ptr, seq_lens_ptr, R, min_tokens, max_tokens, GROUP, BLOCK_M, EACH
    )
    if tokens == 0:
        return
    token, position, lowest, last = steps.positions(row, tokens, keys, GROUP, BLOCK_M)
    if split * (BLOCKS * BLOCK_N) > last:
        return
    exists = (token < tokens)[:, None]
    d, dv = tl.arange(0, D), columns + tl.arange(0, DV)
    q_rows = steps.row_offsets(row, start, token, head, stride_qt, stride_qh, GROUP, BLOCK_M)
    q = tl.load(q_ptr + q_rows[:, None] + d[None, :], mask=exists, other=0.0)
    m, den, acc = steps.walk(
        q, position, lowest, last, keys, split,
        table_ptr + sequence.to(tl.int64) * stride_table,
        k_ptr + head.to(tl.int64) * stride_kh,
        v_ptr + head.to(tl.int64) * stride_vh + columns,
        stride_kb, stride_ks, stride_vb, stride_vs,
        SCALE, PAGE, BLOCK_N, BLOCKS, D, DV, UNMASKED,
    )  # fmt: skip
    if last < BLOCKS * BLOCK_N:  # a single split: folding it would change nothing
        out_rows = steps.row_offsets(row, start, token, head, stride_ot, stride_oh, GROUP, BLOCK_M)
        out = steps.finish(den, acc).to(out_ptr.dtype.element_ty)  # RN
        tl.store(out_ptr + out_rows[:, None] + dv[None, :], out, mask=exists)
    else:
        heads = tl.num_programs(1) // SLICES
        at = (tile.to(tl.int64) * heads + head) * tl.num_programs(2) + split
        in_tile = tl.arange(0, BLOCK_M)
        rows, kept = at * KEPT + in_tile, in_tile < KEPT
        tl.store(acc_ptr + rows[:, None] * D + dv[None, :], acc, mask=kept[:, None])
        if columns == 0:  # every slice has the same
            tl.store(m_ptr + rows, m, mask=kept)
            tl.store(den_ptr + rows, den, mask=kept)


@triton.jit(do_not_specialize=["R", "min_tokens", "max_tokens", "splits"])
def _attention_fold(
    query_start_ptr, seq_lens_ptr, out_ptr, m_ptr, den_ptr, acc_ptr,
    R, min_tokens, max_tokens, splits, stride_ot, stride_oh,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, KEY_SPLIT: tl.constexpr,
    EACH: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    KEPT: tl.constexpr = PARTS * ROWS
    tile, part, head = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1)
    _, row, start, tokens, keys = steps.place(
        tile, query_start_ptr, seq_lens_ptr, R, min_tokens, max_tokens, GROUP, BLOCK_M, EACH
    )
    # As the first kernel saw it: the whole tile has one split, or every row of it was left here.
    _, _, _, last = steps.positions(row, tokens, keys, GROUP, BLOCK_M)
    row += part * ROWS
    if (row >= tokens * GROUP) | (last < KEY_SPLIT):
        return
    token = (row + tl.arange(0, ROWS)) // GROUP
    d = tl.arange(0, D)
    at = (tile.to(tl.int64) * tl.num_programs(1) + head) * splits * KEPT
    rows = at + part * ROWS + tl.arange(0, ROWS)
    total_m = tl.full((ROWS,), float("-inf"), tl.float32)
    total_den = tl.zeros((ROWS,), tl.float32)
    total_acc = tl.zeros((ROWS, D), tl.float32)
    there = last // KEY_SPLIT + 1
    for first in range(0, there, _TOGETHER):
        for i in tl.static_range(_TOGETHER):
            exists = first + i < there  # beyond: m = -inf, so whatever is finite weighs nothing
            mine = rows + (first + i) * KEPT
            m = tl.load(m_ptr + mine, mask=exists, other=float("-inf"))
            den = tl.load(den_ptr + mine, mask=exists, other=1.0)
            acc = tl.load(acc_ptr + mine[:, None] * D + d[None, :], mask=exists, other=0.0)
            total_m, total_den, total_acc = steps.fold(total_m, total_den, total_acc, m, den, acc)
    out_rows = steps.row_offsets(row, start, token, head, stride_ot, stride_oh, GROUP, ROWS)
    out = steps.finish(total_den, total_acc).to(out_ptr.dtype.element_ty)  # RN
    tl.store(out_ptr + out_rows[:, None] + d[None, :], out, mask=(token < tokens)[:, None])


def attention_split(
    x: Inputs, min_tokens: int, max_tokens: int, splits: int, tile: AttentionTile
) -> None:
    """Write the rows of sequences that have min_tokens … max_tokens query tokens.

    splits: of the longest sequence, or more.
    """
    rows, _, head_dim = x.q.shape
    each = triton.cdiv(max_tokens * x.group, tile.block_m)
    if each > _MOST_EACH:
        each = 0
    tiles = x.sequences * each or rows * x.group // tile.block_m + x.sequences
    # Of each tile no more rows than a sequence can have.
    parts = triton.cdiv(min(tile.block_m, max_tokens * x.group), tile.fold_rows)
    kept = parts * tile.fold_rows
    partial = (tiles, x.kv_heads, splits, kept) if splits > 1 else (0,)
    m, den = (torch.empty(partial, device=x.q.device) for _ in range(2))
    acc = torch.empty(*partial, head_dim, device=x.q.device)
    sizes = (x.sequences, min_tokens, max_tokens)
    _attention_split[(tiles, x.kv_heads * tile.slices, splits)](
        *x.pointers, m, den, acc, *sizes, *x.strides,
        **x.constants, BLOCK_M=tile.block_m, SLICES=tile.slices, EACH=each,
        UNMASKED=tile.unmasked, KEPT=kept,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if splits == 1:
        return
    _attention_fold[(tiles * parts, x.kv_heads)](
        x.query_start, x.seq_lens, x.out, m, den, acc, *sizes, splits, *x.out.stride()[:2],
        GROUP=x.group, D=head_dim, BLOCK_M=tile.block_m, KEY_SPLIT=x.contract.key_split,
        EACH=each, ROWS=tile.fold_rows, PARTS=parts,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


INTERPRETED = is_interpreted(_attention_split)
