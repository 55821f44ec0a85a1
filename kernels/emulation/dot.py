"""`tl.dot` through the oracle: the architecture's tensor core, or a chain of FMAs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir

from bitassay.reference import floats, tensor_core

from .arithmetic import FP8, Array, from_torch, to_torch
from .errors import RefusedError

_16_BIT = (tl.bfloat16, tl.float16)
# Where an mma.sync of sm_90 finds the k-th element of a 32-wide block of fp8 that it multiplies as
# fp16: operands loaded at one byte keep their order in registers, the instruction reads another.
_FP8_ORDER = [
    k
    for half in (0, 2)
    for first in (0, 4, 8, 12, 16, 20, 24, 28)
    for k in (first + half, first + half + 1)
]


@dataclass(frozen=True)
class Tile:
    """What decides the instruction besides the dtype: architecture, warps, default imprecision."""

    arch: str
    num_warps: int
    default_imprecise: int


def dot(
    a: Array,
    b: Array,
    c: Array,
    dtype: tl.dtype,
    out: tl.dtype,
    precision: ir.INPUT_PRECISION,
    imprecise: int,
    tile: Tile,
) -> Array:  # [.., M, K], [.., K, N], [.., M, N] -> [.., M, N]
    """Return c + a @ b with the bits of the architecture; leading dimension: a batch."""
    if dtype == tl.int8:
        left, right = (torch.from_numpy(x.astype("int32")) for x in (a, b))
        return (torch.from_numpy(c.copy()) + torch.matmul(left, right)).numpy()  # modulo 2**32
    if out != tl.float32:
        raise RefusedError(
            f"tl.dot with out_dtype={out}: how often {out} is rounded inside an instruction is "
            "not known for every architecture; accumulate in tl.float32 and convert the result"
        )
    if imprecise != tile.default_imprecise * (dtype in FP8):
        raise RefusedError(
            f"tl.dot with max_num_imprecise_acc={imprecise} for {dtype}: only the default is "
            "modelled; leave it out"
        )
    x, y, acc = to_torch(a, dtype), to_torch(b, dtype), to_torch(c, tl.float32)
    if a.ndim == 3:
        if dtype in FP8 and tile.arch == "sm_90":
            raise RefusedError(
                "tl.dot of fp8 with a batch dimension on sm_90: the compiler multiplies it as fp16 "
                "whatever the tile; give every product of the batch its own program"
            )
        parts = [_matmul(x[i], y[i], acc[i], dtype, precision, tile) for i in range(len(x))]
        return from_torch(torch.stack(parts))
    return from_torch(_matmul(x, y, acc, dtype, precision, tile))


def _matmul(
    a: Tensor, b: Tensor, c: Tensor, dtype: tl.dtype, precision: ir.INPUT_PRECISION, tile: Tile
) -> Tensor:
    if dtype in _16_BIT:  # input_precision says nothing about 16-bit operands
        return tensor_core.matmul(a, b, c, arch=tile.arch)
    if dtype == tl.float32:
        if precision == ir.INPUT_PRECISION.TF32:
            return tensor_core.matmul(a, b, c, arch=tile.arch, precision="tf32")
        if precision == ir.INPUT_PRECISION.IEEE:
            for k in range(a.shape[1]):  # ascending; unlike the oracle's matmul it may end in -0
                c = floats.fma(a[:, k, None], b[k], c)
            return c
        raise RefusedError(
            f"tl.dot with input_precision={precision.name.lower()}: several products whose order "
            'is Triton\'s own; use input_precision="tf32" or "ieee"'
        )
    if dtype in FP8:
        return _fp8(a, b, c, tile)
    raise RefusedError(f"tl.dot on {dtype}: not modelled; use bf16, fp16, fp32, fp8 or int8")


def _fp8(a: Tensor, b: Tensor, c: Tensor, tile: Tile) -> Tensor:
    """Multiply fp8 as the tile makes the compiler choose: only on sm_90 does it change bits."""
    m, n = c.shape
    if tile.arch != "sm_90" or (m % 64 == 0 and n % 16 == 0 and tile.num_warps % 4 == 0):
        return tensor_core.matmul(a, b, c, arch=tile.arch)
    if m >= 64:
        raise RefusedError(
            f"tl.dot on fp8 with a {m} x {n} tile and {tile.num_warps} warps on sm_90: it is not "
            "known which instruction multiplies it; use BLOCK_M 16 or 32, or BLOCK_M a multiple of "
            "64 with BLOCK_N a multiple of 16 and 4 or 8 warps"
        )
    order = [block + k for block in range(0, a.shape[1], 32) for k in _FP8_ORDER]
    return tensor_core.matmul(a[:, order].half(), b[order].half(), c, arch=tile.arch)
