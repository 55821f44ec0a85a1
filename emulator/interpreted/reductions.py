"""`tl.reduce` and `tl.associative_scan`: those whose result no order can change.

Among sums of floats that is one over an axis of two (or one): a single addition, which commutes.
Compiled, it is exactly that, with no zero to start from, whatever the layout.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.language import standard
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle, _get_np_dtype

from bitassay.emulator.errors import RefusedError
from bitassay.emulator.interpreted.arithmetic import FLOATS, Array, extremum, widen

_MAX, _MIN = standard._elementwise_max, standard._elementwise_min
_ARG = {  # combine function -> (takes the largest, lowest index wins a tie)
    standard._argmax_combine_tie_break_left: (True, True),
    standard._argmax_combine_tie_break_fast: (True, False),
    standard._argmin_combine_tie_break_left: (False, True),
    standard._argmin_combine_tie_break_fast: (False, False),
}
_ADVICE = (
    "the order depends on layout, warps and Triton's version. Halve explicitly instead "
    "(tl.reshape to [..., 2, n / 2] and tl.sum over the axis of two, repeated)"
)


def _name(combine: Any, scan: bool) -> str:
    if combine is standard._sum_combine:
        return "cumsum" if scan else "sum"
    if combine is getattr(standard, "_prod_combine", None):
        return "cumprod" if scan else "prod"
    return "associative_scan" if scan else "reduce"


def _one_addition(inputs: tuple[Any, ...], combine: Any, axis: int | None) -> bool:
    """Return whether a reduction adds no more than two fp32 values for each result."""
    if combine is not standard._sum_combine or len(inputs) != 1:
        return False
    data = inputs[0].handle.data
    count = data.size if axis is None else data.shape[axis]
    return bool(inputs[0].dtype.scalar == tl.float32 and count <= 2)


def _check(inputs: tuple[Any, ...], combine: Any, scan: bool, allowed: frozenset[str]) -> None:
    """Refuse floats whose result an order could change."""
    name = _name(combine, scan)
    floating = [x.dtype.scalar for x in inputs if not x.dtype.scalar.is_int()]
    if name in allowed or not floating or combine in (_MAX, _MIN) or combine in _ARG:
        return
    raise RefusedError(
        f"tl.{name} of {floating[0]}: {_ADVICE}; or allow it by name: BITASSAY_ALLOW={name}"
    )


def reduce_ops(builder: Any) -> type:
    """Return a replacement of the interpreter's ReduceOps that refuses undefined orders."""
    allowed = builder.allowed

    class ReduceOps(interpreter.ReduceOps):  # type: ignore[misc]
        def to_tensor(self, ret: Any, dtype: Any) -> Any:
            ret = np.asarray(ret)  # a plain integer too large for the dtype wraps, as arrays do
            return super().to_tensor(ret.astype(_get_np_dtype(dtype))[()], dtype)

        def apply_impl(self, inputs: tuple[Any, ...]) -> Any:
            if _one_addition(inputs, self.combine_fn, self.axis):
                return self._addition(inputs[0])
            _check(inputs, self.combine_fn, False, allowed)
            if self.combine_fn in _ARG:
                return self._arg(*inputs)
            if self.combine_fn in (_MAX, _MIN):
                return self._extremum(inputs[0])
            if self.combine_fn is standard._xor_combine:
                data = inputs[0].handle.data
                folded = np.bitwise_xor.reduce(data, axis=self.axis, keepdims=self.keep_dims)
                return self.to_tensor(folded, inputs[0].dtype)
            return super().apply_impl(inputs)

        def _addition(self, x: Any) -> Any:
            handle, axis = x.handle, self.axis
            if handle.attr.get("outer") and "sum" not in allowed:
                raise RefusedError(
                    "tl.sum of a product of two broadcasts: the compiler may make it a tl.dot; "
                    "multiply before the broadcast, or allow it by name: BITASSAY_ALLOW=sum"
                )
            data = handle.data
            if axis is None:
                data, axis = data.reshape(-1), 0
            notes = handle.attr
            halves = [TensorHandle(h, tl.float32, {**notes}) for h in np.moveaxis(data, axis, 0)]
            total = builder.create_fadd(*halves) if halves[1:] else halves[0]
            result = self._packed(total.data, x)
            result.handle.attr.update(total.attr)
            return result

        def _extremum(self, x: Any) -> Any:
            data, dtype, largest = x.handle.data, x.dtype.scalar, self.combine_fn is _MAX
            if dtype not in FLOATS:
                operation = np.max if largest else np.min
                return self.to_tensor(
                    operation(data, axis=self.axis, keepdims=self.keep_dims), x.dtype
                )
            axis = self.axis
            if axis is None:
                data, axis = data.reshape(-1), 0
            data = np.moveaxis(data, axis, 0)
            result = data[0]
            for other in data[1:]:  # in any order: -0 < +0, and NaN loses to every number
                result = extremum(result, other, dtype, largest=largest, propagate=False)
            return self._packed(result, x)

        def _arg(self, x: Any, index: Any) -> Any:
            largest, leftmost = _ARG[self.combine_fn]
            data, indices = widen(x.handle.data, x.dtype.scalar), index.handle.data
            axis = self.axis
            if axis is None:
                data, indices, axis = data.reshape(-1), indices.reshape(-1), 0
            if np.isnan(data).any():
                raise RefusedError("argmax or argmin of NaN: the result depends on the order")
            best = (np.max if largest else np.min)(data, axis=axis, keepdims=True)
            ties = data == best
            if not leftmost and (ties.sum(axis=axis) > 1).any():
                raise RefusedError(
                    "argmax or argmin with tie_break_left=False found a tie: which index wins is "
                    "not defined; use tie_break_left=True"
                )
            last = np.iinfo(indices.dtype).max
            chosen = np.min(np.where(ties, indices, last), axis=axis, keepdims=True)
            at = np.argmax(ties & (indices == chosen), axis=axis)
            raw = x.handle.data.reshape(data.shape)
            value = np.take_along_axis(raw, np.expand_dims(at, axis), axis).squeeze(axis)
            return self._packed(value, x), self._packed(chosen.squeeze(axis), index)

        def _packed(self, result: Array, like: Any) -> Any:
            if self.keep_dims:
                rank = like.handle.data.ndim
                axes = tuple(range(rank)) if self.axis is None else self.axis
                result = np.expand_dims(result, axes)
            return self.to_tensor(result if np.ndim(result) else result[()], like.dtype)

    return ReduceOps


def scan_ops(allowed: frozenset[str]) -> type:
    """Return a replacement of the interpreter's ScanOps that refuses undefined orders."""

    class ScanOps(interpreter.ScanOps):  # type: ignore[misc]
        def apply_impl(self, inputs: tuple[Any, ...]) -> Any:
            _check(inputs, self.combine_fn, True, allowed)
            return super().apply_impl(inputs)

    return ScanOps
