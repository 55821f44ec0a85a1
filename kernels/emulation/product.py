"""The builder's `tl.dot`: refused where the compiler may change what is multiplied or added."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from .dot import Tile, dot
from .errors import RefusedError


class Product:
    """Each `_create_*` stands for the builder's `create_*`."""

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
