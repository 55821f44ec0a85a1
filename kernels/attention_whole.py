"""Attention in one program per tile of query rows: all splits walked and folded inside."""

from __future__ import annotations

import triton
import triton.language as tl

from bitassay.kernels import attention_steps as steps
from bitassay.kernels.attention_inputs import Inputs
from bitassay.kernels.attention_tiles import AttentionTile
from bitassay.kernels.device import is_interpreted


# Not specialised: these change with the batch, and their values give the compiler nothing.
@triton.jit(do_not_specialize=["R", "min_tokens", "max_tokens"])
def _attention_whole(
    q_ptr, k_ptr, v_ptr, table_ptr, query_start_ptr, seq_lens_ptr, out_ptr,
    R, min_tokens, max_tokens,
    stride_qt, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_table, stride_ot, stride_oh,
    SCALE: tl.constexpr, GROUP: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    # The last tiles of a prompt see the most keys: begun first, they do not end last.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence, row, start, tokens, keys = steps.place(
        tile, query_start_ptr, seq_lens_ptr, R, min_tokens, max_tokens, GROUP, BLOCK_M, 0
    )
    if tokens == 0:
        return
    token, position, lowest, last = steps.positions(row, tokens, keys, GROUP, BLOCK_M)
    exists = (token < tokens)[:, None]
    d = tl.arange(0, D)
    q_rows = steps.row_offsets(row, start, token, head, stride_qt, stride_qh, GROUP, BLOCK_M)
    q = tl.load(q_ptr + q_rows[:, None] + d[None, :], mask=exists, other=0.0)
    table_ptr += sequence.to(tl.int64) * stride_table
    k_ptr += head.to(tl.int64) * stride_kh
    v_ptr += head.to(tl.int64) * stride_vh
    if ONE:  # no sequence has a second split
        _, den, acc = steps.walk(
            q, position, lowest, last, keys, 0, table_ptr, k_ptr, v_ptr,
            stride_kb, stride_ks, stride_vb, stride_vs,
            SCALE, PAGE, BLOCK_N, BLOCKS, D, D, True,
        )  # fmt: skip
    else:
        m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        den = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, D), tl.float32)
        for split in range(last // (BLOCKS * BLOCK_N) + 1):
            part_m, part_den, part_acc = steps.walk(
                q, position, lowest, last, keys, split, table_ptr, k_ptr, v_ptr,
                stride_kb, stride_ks, stride_vb, stride_vs,
                SCALE, PAGE, BLOCK_N, BLOCKS, D, D, True,
            )  # fmt: skip
            m, den, acc = steps.fold(m, den, acc, part_m, part_den, part_acc)
    out_rows = steps.row_offsets(row, start, token, head, stride_ot, stride_oh, GROUP, BLOCK_M)
    out = steps.finish(den, acc).to(out_ptr.dtype.element_ty)  # RN
    tl.store(out_ptr + out_rows[:, None] + d[None, :], out, mask=exists)


def attention_whole(
    x: Inputs, min_tokens: int, max_tokens: int, splits: int, tile: AttentionTile
) -> None:
    """Write the rows of sequences that have min_tokens … max_tokens query tokens.

    splits: of the longest sequence, or more.
    """
    tiles = x.q.shape[0] * x.group // tile.block_m + x.sequences
    _attention_whole[(x.kv_heads, tiles)](
        *x.pointers, x.sequences, min_tokens, max_tokens, *x.strides,
        **x.constants, BLOCK_M=tile.block_m, ONE=splits == 1,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip


INTERPRETED = is_interpreted(_attention_whole)
