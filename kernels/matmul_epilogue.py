"""What the two matrix-product kernels share: where a tile lies and how it ends."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(tile, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Return the row and column of a tile: down a group of rows first, so caches are shared."""
    size = GROUP * column_tiles
    first = tile // size * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + tile % size % height, tile % size // height


@triton.jit
def finish(
    acc, bias_ptr, cols, N, vocab_size,
    HAS_BIAS: tl.constexpr, PADDED: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """Return fp32 [BLOCK_M, BLOCK_N] with the bias added and the padded vocabulary at -inf."""
    if IEEE:
        acc = acc + 0.0  # -0 to +0, so that K padded with zeros cannot show
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0)
        acc = acc + bias.to(tl.float32)[None, :]  # RN: one fp32 addition
    if PADDED:
        acc = tl.where((cols < vocab_size)[None, :], acc, float("-inf"))
    return acc
