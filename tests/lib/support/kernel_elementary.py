"""A kernel around each device function of elementary.py and tree.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from bitassay.kernels.elementary import exp, exp2, log, silu
from bitassay.kernels.tree import tree_sum
from bitassay.reference import elementary

REFERENCE: dict[str, Callable[[Tensor], Tensor]] = {
    "exp2": elementary.exp2,
    "exp": elementary.exp,
    "silu": elementary.silu,
    "log": elementary.log,
}
# The patterns of fp32, first and beyond the last, that a function is defined on.
DOMAIN = {
    "exp2": [(0, 1 << 32)],
    "exp": [(0, 1), (1 << 31, (0xFF800000) + 1), (0x7F800001, 1 << 31)],  # <= 0, NaN
    "silu": [(0, 1 << 32)],
    "log": [(0x3F800000, 0x7F800000)],  # finite, from 1 on
}


@triton.jit
def _elementary(x_ptr, out_ptr, N, OP: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N, other=1.0)
    if OP == "exp2":
        y = exp2(x)
    elif OP == "exp":
        y = exp(x)
    elif OP == "silu":
        y = silu(x)
    else:
        y = log(x)
    tl.store(out_ptr + i, y, mask=i < N)


def run(name: str, x: Tensor) -> Tensor:  # [N] -> [N]
    """One of REFERENCE, in a kernel."""
    out = torch.empty_like(x)
    block = 1024 if x.is_cuda else 1 << 16
    _elementary[(triton.cdiv(len(x), block),)](
        x, out, len(x), OP=name, BLOCK=block, num_warps=4, enable_fp_fusion=False
    )
    return out


@triton.jit
def _tree(
    x_ptr, out_ptr,  # [R, N], [R]
    N, ROWS: tl.constexpr, PADDED: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    if FLAT:
        x = tl.load(x_ptr + tl.program_id(0) * N + cols, mask=cols < N, other=0.0)
        tl.store(out_ptr + tl.program_id(0), tree_sum(x))
    else:
        inside = (rows < 1 << 30)[:, None] & (cols < N)[None, :]
        x = tl.load(x_ptr + rows[:, None] * N + cols[None, :], mask=inside, other=0.0)
        tl.store(out_ptr + rows, tree_sum(x))


def run_tree(x: Tensor, rows: int, warps: int = 4) -> Tensor:  # [R, N] -> [R]
    """tree_sum of so many rows at a time; 0 takes one row as a vector."""
    out = torch.empty(x.shape[0], device=x.device)
    padded = triton.next_power_of_2(x.shape[1])
    _tree[(x.shape[0] // max(rows, 1),)](
        x, out, x.shape[1], ROWS=max(rows, 1), PADDED=padded, FLAT=rows == 0,
        num_warps=warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def from_range(first: int, beyond: int, device: str | torch.device = "cpu") -> Tensor:
    """The fp32 values of a range of patterns."""
    return torch.arange(first, beyond, device=device).to(torch.int32).view(torch.float32)
