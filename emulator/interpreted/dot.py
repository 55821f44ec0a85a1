"""`tl.dot` through the oracle: the architecture's tensor core, or a chain of FMAs.

It is refused where the compiler may change what is multiplied or added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from bitassay.emulator.errors import RefusedError
from bitassay.emulator.interpreted.arithmetic import FP8, Array, from_torch, to_torch
from bitassay.reference import floats, tensor_core
from bitassay.reference.spec.arch import emulation_of

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
        if dtype in FP8 and emulation_of(tile.arch).fp8_by_wgmma:
            raise RefusedError(
                f"tl.dot of fp8 with a batch dimension on {tile.arch}: the compiler multiplies it "
                "as fp16 whatever the tile; give every product of the batch its own program"
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
    """Multiply fp8 as the tile makes the compiler choose, where that changes bits."""
    m, n = c.shape
    as_wgmma = m % 64 == 0 and n % 16 == 0 and tile.num_warps % 4 == 0
    if as_wgmma or not emulation_of(tile.arch).fp8_by_wgmma:
        return tensor_core.matmul(a, b, c, arch=tile.arch)
    if m >= 64:
        raise RefusedError(
            f"tl.dot on fp8 with a {m} x {n} tile and {tile.num_warps} warps on {tile.arch}: it "
            "is not known which instruction multiplies it; use BLOCK_M 16 or 32, or BLOCK_M a "
            "multiple of 64 with BLOCK_N a multiple of 16 and 4 or 8 warps"
        )
    order = [block + k for block in range(0, a.shape[1], 32) for k in _FP8_ORDER]
    return tensor_core.matmul(a[:, order].half(), b[order].half(), c, arch=tile.arch)


class DotOperations:
    """The builder's `create_splat` and `create_dot`, which notes what a later addition needs."""

    plain: InterpreterBuilder
    options: Any
    arch: str
    num_warps: int
    accumulates: bool
    runtime_bounds: int

    def _create_splat(self, kind: Any, value: TensorHandle) -> Any:
        result = self.plain.create_splat(kind, value)
        if value.dtype in (tl.float32, tl.bfloat16, tl.float16) and not value.data.any():
            result.attr["zero"] = self.runtime_bounds
        return result

    def _create_dot(
        self, a: TensorHandle, b: TensorHandle, c: TensorHandle, precision: Any, imprecise: int
    ) -> Any:
        dtype = a.dtype.scalar
        if b.dtype.scalar != dtype:
            raise RefusedError(
                f"tl.dot of {dtype} by {b.dtype.scalar}: not modelled; store both operands in one "
                "type"
            )
        exact_order = dtype == tl.float32 and precision == ir.INPUT_PRECISION.IEEE
        for operand, handle in (("first", a), ("second", b)):
            if handle.attr.get("narrow", 99) < dtype.primitive_bitwidth and not exact_order:
                raise RefusedError(
                    f"the {operand} operand of tl.dot was made from values of "
                    f"{handle.attr['narrow']} bits and is multiplied at "
                    f"{dtype.primitive_bitwidth}: the compiler then permutes K; store the operand "
                    f"as {dtype} and load it so"
                )
        tile = Tile(self.arch, self.num_warps, self.options.max_num_imprecise_acc_default)
        data = dot(a.data, b.data, c.data, dtype, c.dtype.scalar, precision, imprecise, tile)
        result = TensorHandle(data, c.dtype.scalar)
        # With a loop bound known only at run time between them, c is no constant to the compiler.
        constant = c.attr.get("zero", -1) >= self.runtime_bounds
        result.attr["dot"] = constant or not self.accumulates
        return result
