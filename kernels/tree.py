"""The sum of a row as a tree: element i with element i + n/2, from the top down.

Each level adds the two halves by a reduction over an axis of exactly two elements. That is one
addition, which commutes, so the layout that the compiler picks cannot show; it becomes a register
addition, a shuffle or an exchange between warps, whichever is at hand.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def _levels(width):
    return width.bit_length() - 1


@triton.jit
def tree_sum(x):  # [P] -> [], [R, P] -> [R]
    """Return the sum over the last axis of fp32; P is a power of two, padded with +0."""
    flat: tl.constexpr = len(x.shape) == 1
    rows: tl.constexpr = 1 if flat else x.shape[0]
    width: tl.constexpr = x.shape[len(x.shape) - 1]
    x = tl.reshape(x, (rows, width))
    for level in tl.static_range(_levels(width)):
        x = tl.sum(tl.reshape(x, (rows, 2, width >> (level + 1))), axis=1)
    if flat:
        return tl.sum(tl.reshape(x, (1,)), axis=0)  # of one element: nothing is added
    else:
        return tl.reshape(x, (rows,))
