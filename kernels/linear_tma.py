"""Matrix product through host-made descriptors: the tensor memory accelerator of sm_90.

Programs are persistent: one per multiprocessor (or a few), each taking every so many-th tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bitassay.kernels.device import fits_descriptor, make_descriptor, multiprocessors
from bitassay.kernels.matmul_epilogue import finish, place
from bitassay.kernels.tiles import GROUP, Tile


@triton.jit(do_not_specialize=["steps"])  # as in linear_pointer
def _linear_tma(
    x_desc, w_desc, bias_ptr, out_desc,  # [M, K], [N, K] or [K, N], [N], [M, N]
    M, N, steps, vocab_size,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SWAP: tl.constexpr, HALVES: tl.constexpr, K_FIRST: tl.constexpr, HAS_BIAS: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    tl.assume(steps > 0)
    row_tiles = tl.cdiv(M, BLOCK_M)
    column_tiles = tl.cdiv(N, BLOCK_N)
    # Flattened with the loop over K, so that a tile's loads start while the last one is stored.
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True
    ):
        row, col = place(tile, row_tiles, column_tiles, GROUP)
        if SWAP:
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(steps):  # K ascending; descriptors read zeros beyond K, M and N
            k = step * BLOCK_K
            x = x_desc.load([row * BLOCK_M, k])
            w = w_desc.load([k, col * BLOCK_N]).T if K_FIRST else w_desc.load([col * BLOCK_N, k])
            acc = tl.dot(w, x.T, acc) if SWAP else tl.dot(x, w.T, acc)
        if SWAP:
            acc = tl.trans(acc)
        if HALVES:
            HALF: tl.constexpr = BLOCK_N // 2
            pair = tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1))
            left, right = tl.split(pair)
            cols = col * BLOCK_N + tl.arange(0, HALF)
            left = finish(left, bias_ptr, cols, N, vocab_size, HAS_BIAS, PADDED, False)
            out_desc.store([row * BLOCK_M, col * BLOCK_N], left.to(out_desc.dtype))  # RN
            right = finish(right, bias_ptr, cols + HALF, N, vocab_size, HAS_BIAS, PADDED, False)
            out_desc.store([row * BLOCK_M, col * BLOCK_N + HALF], right.to(out_desc.dtype))  # RN
        else:
            cols = col * BLOCK_N + tl.arange(0, BLOCK_N)
            acc = finish(acc, bias_ptr, cols, N, vocab_size, HAS_BIAS, PADDED, False)
            out_desc.store([row * BLOCK_M, col * BLOCK_N], acc.to(out_desc.dtype))  # RN


def linear_tma(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    bias: Tensor | None,  # [N]
    out: Tensor,  # [M, N]
    vocab_size: int,
    tile: Tile,
) -> None:
    """Write x @ weight.T + bias to out; `fits` says for which operands."""
    (m, k), n = x.shape, weight.shape[0]
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    k_first = weight.stride(1) != 1
    w_block = [tile.block_n, tile.block_k]
    out_block = [tile.block_m, tile.block_n // (1 + tile.halves)]
    stages = tile.stages - (out.element_size() == 4)  # fp32 results take a stage's shared memory
    _linear_tma[(min(tiles, multiprocessors(x.device) * tile.per_sm),)](
        make_descriptor(x, [tile.block_m, tile.block_k]),
        make_descriptor(_rows(weight), w_block[::-1] if k_first else w_block),
        bias,
        make_descriptor(out, out_block),
        m, n, triton.cdiv(k, tile.block_k), vocab_size,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP=GROUP,
        SWAP=tile.swap, HALVES=tile.halves, K_FIRST=k_first, HAS_BIAS=bias is not None,
        PADDED=vocab_size < n,
        num_warps=tile.warps, num_stages=stages, enable_fp_fusion=False,
    )  # fmt: skip


def fits(x: Tensor, weight: Tensor, out: Tensor) -> bool:
    """Return whether descriptors can hold the operands: 16 bits, rows on 16-byte boundaries."""
    if x.element_size() != 2 or x.shape[1] == 0:
        return False
    return all(fits_descriptor(t) for t in (x, _rows(weight), out))


def _rows(weight: Tensor) -> Tensor:
    """Return the weight with its contiguous axis last: itself, or [K, N] for a transposed view."""
    return weight if weight.stride(1) == 1 else weight.t()
