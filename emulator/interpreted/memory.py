"""The builder's operations on integers, shapes and memory where Triton's own will not do."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

from bitassay.emulator.errors import RefusedError
from bitassay.emulator.interpreted import arithmetic
from bitassay.emulator.interpreted.arithmetic import FLOATS

_ORDER_FREE = {"ADD", "MIN", "UMIN", "MAX", "UMAX", "AND", "OR", "XOR"}


class Memory:
    """Each `_create_*` stands for the builder's `create_*`."""

    plain: InterpreterBuilder
    allowed: frozenset[str]

    # Shapes

    def _create_reshape(self, source: TensorHandle, shape: Any, reorder: bool) -> Any:
        if reorder:
            raise RefusedError(
                "tl.reshape with can_reorder=True (tl.view): which element goes where is not "
                "defined; use tl.reshape without it"
            )
        return self.plain.create_reshape(source, shape, reorder)

    # Integers that Triton's interpreter gets wrong in one version or another

    def get_all_ones_value(self, kind: Any) -> TensorHandle:
        """Return a scalar with every bit set."""
        dtype = _get_np_dtype(kind)
        return TensorHandle(np.full(1, -1).astype(dtype), kind.scalar)

    def _create_umulhi(self, a: TensorHandle, b: TensorHandle) -> Any:
        width = 8 * a.data.itemsize
        unsigned = np.dtype(f"u{a.data.itemsize}")
        x, y = (h.data.view(unsigned).astype(object) for h in (a, b))
        high = ((x * y) >> width).astype(unsigned).view(a.data.dtype)
        return TensorHandle(high, a.dtype.scalar)

    def _create_ashr(self, a: TensorHandle, b: TensorHandle) -> Any:
        signed = np.dtype(f"i{a.data.itemsize}")
        shifted = np.right_shift(a.data.view(signed), b.data.astype(signed))
        return TensorHandle(shifted.view(a.data.dtype), a.dtype.scalar)

    def _create_histogram(self, source: TensorHandle, bins: int, mask: Any) -> Any:
        values = source.data.reshape(-1).astype(np.int64)
        kept = (values >= 0) & (values < bins)
        if mask is not None:
            kept &= mask.data.reshape(-1)
        counts = np.bincount(values[kept], minlength=bins)
        return TensorHandle(counts.astype(np.int32), tl.int32)

    # Memory

    def _create_masked_load(
        self, pointers: TensorHandle, mask: TensorHandle, other: Any, *args: Any, **kwargs: Any
    ) -> Any:
        dtype = pointers.get_element_ty()
        if other is None and dtype in FLOATS:  # undefined: show it rather than hide it in a zero
            nan = arithmetic.narrow(np.full((), np.nan, np.float32), dtype)
            other = TensorHandle(np.full(pointers.data.shape, nan), dtype)
        return self.plain.create_masked_load(pointers, mask, other, *args, **kwargs)

    def _create_atomic_rmw(
        self, op: Any, pointers: TensorHandle, value: TensorHandle, mask: Any, *args: Any
    ) -> Any:
        if op.name not in _ORDER_FREE:
            name = {"FADD": "atomic_add", "XCHG": "atomic_xchg"}.get(op.name, op.name)
            if name not in self.allowed:
                raise RefusedError(
                    f"tl.{name} of {value.dtype.scalar}: which program comes first is not defined; "
                    "write partial results and combine them in a fixed order, or allow it by "
                    f"name: BITASSAY_ALLOW={name}"
                )
        result = self.plain.create_atomic_rmw(op, pointers, value, mask, *args)
        result.attr["race"] = True
        return result
