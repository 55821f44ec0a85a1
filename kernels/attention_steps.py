"""What every attention kernel is made of: where its rows are, one split's walk, fold and end.

Rows of a program are query tokens of one sequence times the query heads of one key/value head,
tokens first, so that all of them read the same keys. Nothing here looks at more than the row
itself, its position and the keys up to it: rows of a tile share loads, not arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitassay.kernels.elementary import exp2_nonpositive
from bitassay.kernels.tree import tree_sum

_MINUS_INFINITY = tl.constexpr(float("-inf"))
_SEQUENCES = tl.constexpr(256)  # looked through at a time when a tile searches its sequence


@triton.jit
def place(
    tile, query_start_ptr, seq_lens_ptr, R, min_tokens, max_tokens,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Return a tile's sequence, first row in it, first query token, tokens and keys.

    EACH: tiles that every sequence has. 0: a sequence has as many as it needs; tile
    query_start[r] * GROUP // BLOCK_M + r is its first. Tokens are 0 where the tile holds no row,
    or where the sequence has not min_tokens … max_tokens of them.
    """
    if EACH == 0:
        sequence = -1
        for r in range(0, R, _SEQUENCES):
            some = r + tl.arange(0, _SEQUENCES)
            starts = tl.load(query_start_ptr + some, mask=some < R, other=0)
            first = starts * GROUP // BLOCK_M + some
            sequence += tl.sum(((first <= tile) & (some < R)).to(tl.int32), 0)
        start = tl.load(query_start_ptr + sequence)
        row = (tile - start * GROUP // BLOCK_M - sequence) * BLOCK_M
    else:
        sequence = tile // EACH
        start = tl.load(query_start_ptr + sequence)
        row = tile % EACH * BLOCK_M
    tokens = tl.load(query_start_ptr + sequence + 1) - start
    keys = tl.load(seq_lens_ptr + sequence)
    inside = (tokens >= min_tokens) & (tokens <= max_tokens) & (row < tokens * GROUP)
    return sequence, row, start, tl.where(inside, tokens, 0), keys


@triton.jit
def positions(row, tokens, keys, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return each row's token and position, and the first and last position of the tile."""
    token = (row + tl.arange(0, BLOCK_M)) // GROUP
    last = tl.minimum((row + BLOCK_M - 1) // GROUP, tokens - 1)
    before = keys - tokens
    return token, before + token, before + row // GROUP, before + last


@triton.jit
def row_offsets(
    row, start, token, head, stride_t, stride_h, GROUP: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Return where each row lies in a tensor [T, Hq, D], int64 [BLOCK_M]."""
    query_head = head * GROUP + (row + tl.arange(0, BLOCK_M)) % GROUP
    return (start + token).to(tl.int64) * stride_t + query_head.to(tl.int64) * stride_h


@triton.jit
def _step(
    block, q, m, den, acc, position, keys, table_ptr, k_ptr, v_ptr,
    stride_kb, stride_ks, stride_vb, stride_vs,
    SCALE: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take one block of keys into m, den and acc; MASKED: some row may not see some key."""
    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    d, dv = tl.arange(0, D), tl.arange(0, DV)
    # Nothing beyond the sequence is read: its table entries and its slots hold anything.
    inside = key < keys
    if MASKED:
        entry = tl.load(table_ptr + key // PAGE, mask=inside, other=0).to(tl.int64)
    else:
        entry = tl.load(table_ptr + key // PAGE).to(tl.int64)
    slot = key % PAGE
    k_ptrs = k_ptr + (entry * stride_kb + slot * stride_ks)[:, None] + d[None, :]
    v_ptrs = v_ptr + (entry * stride_vb + slot * stride_vs)[:, None] + dv[None, :]
    k = tl.load(k_ptrs, mask=inside[:, None], other=0.0) if MASKED else tl.load(k_ptrs)
    t = tl.dot(q, tl.trans(k)) * SCALE  # RN: one multiplication; the dot starts at +0
    if MASKED:
        t = tl.where(key[None, :] <= position[:, None], t, _MINUS_INFINITY)
    highest = tl.maximum(m, tl.max(t, 1))  # NaN loses to numbers
    base = tl.where(highest > _MINUS_INFINITY, highest, 0.0)  # -inf - -inf would be NaN
    p = exp2_nonpositive(t - base[:, None])  # RN the difference
    keep = exp2_nonpositive(m - base)
    den = tl.fma(den, keep, tree_sum(p))  # RN
    v = tl.load(v_ptrs, mask=inside[:, None], other=0.0) if MASKED else tl.load(v_ptrs)
    acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None])  # RN: p, and acc * keep, which is c
    return highest, den, acc


@triton.jit
def walk(
    q, position, lowest, last, keys, split, table_ptr, k_ptr, v_ptr,
    stride_kb, stride_ks, stride_vb, stride_vs,
    SCALE: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, UNMASKED: tl.constexpr,
):  # fmt: skip
    """Return m, den, acc of one split: its blocks of keys, ascending, as far as a row sees.

    BLOCKS: of a split. UNMASKED: a loop of its own for the blocks that all rows see whole.
    """
    BLOCK_M: tl.constexpr = q.shape[0]
    m = tl.full((BLOCK_M,), _MINUS_INFINITY, tl.float32)
    den = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, DV), tl.float32)
    first = split * BLOCKS
    end = tl.minimum(last // BLOCK_N + 1, first + BLOCKS)
    if UNMASKED:
        whole = tl.maximum(tl.minimum((lowest + 1) // BLOCK_N, first + BLOCKS), first)
        for block in range(first, whole):
            m, den, acc = _step(
                block, q, m, den, acc, position, keys, table_ptr, k_ptr, v_ptr,
                stride_kb, stride_ks, stride_vb, stride_vs,
                SCALE, PAGE, BLOCK_N, D, DV, False,
            )  # fmt: skip
        first = whole
    for block in range(first, end):
        m, den, acc = _step(
            block, q, m, den, acc, position, keys, table_ptr, k_ptr, v_ptr,
            stride_kb, stride_ks, stride_vb, stride_vs,
            SCALE, PAGE, BLOCK_N, D, DV, True,
        )  # fmt: skip
    return m, den, acc


@triton.jit
def fold(total_m, total_den, total_acc, m, den, acc):
    """Return the state of all splits so far with the next one's added; an empty one changes none.

    Starting from -inf, 0, 0 the first split is taken over exactly.
    """
    highest = tl.maximum(total_m, m)
    base = tl.where(highest > _MINUS_INFINITY, highest, 0.0)
    old, new = exp2_nonpositive(total_m - base), exp2_nonpositive(m - base)
    total_den = tl.fma(total_den, old, den * new)  # RN the product, RN the rest
    total_acc = tl.fma(total_acc, old[:, None], acc * new[:, None])  # RN, RN
    return highest, total_den, total_acc


@triton.jit
def finish(den, acc):
    """Return acc / den, correctly rounded, with -0 as +0."""
    return tl.div_rn(acc, tl.broadcast_to(den[:, None], acc.shape)) + 0.0
