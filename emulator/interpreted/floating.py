"""The builder's floating-point operations: arithmetic, comparisons, choices, conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

from bitassay.emulator.errors import RefusedError
from bitassay.emulator.interpreted import arithmetic
from bitassay.emulator.interpreted.arithmetic import FLOATS, FP8, Array
from bitassay.reference.spec.arch import Emulation


class FloatingPoint:
    """Each `_create_*` stands for the builder's `create_*`."""

    plain: InterpreterBuilder
    arch: str
    facts: Emulation
    allowed: frozenset[str]
    fusion: bool
    multiplied: bool
    added: bool

    # Constants

    def get_fp16(self, value: float) -> TensorHandle:
        """Return an fp16 constant, rounded as the compiler does: to fp32 first."""
        with np.errstate(over="ignore"):
            return TensorHandle(np.array([value], np.float32).astype(np.float16), tl.float16)

    def get_bf16(self, value: float) -> TensorHandle:
        """Return a bf16 constant; the compiler writes it with six decimals."""
        with np.errstate(over="ignore"):
            wanted = arithmetic.narrow(np.array([value], np.float32), tl.bfloat16)
            printed = np.array([float(f"{float(np.float32(value)):f}")], np.float32)
        if (arithmetic.narrow(printed, tl.bfloat16) != wanted).any():
            raise RefusedError(
                f"the bf16 constant {value!r}: Triton's compiler writes it with six decimals and "
                f"makes it {printed[0]!r}; compute in tl.float32 and convert"
            )
        return TensorHandle(wanted, tl.bfloat16)

    # Arithmetic

    def _arithmetic(self, name: str, op: Callable[..., Array], *args: TensorHandle) -> TensorHandle:
        dtype = args[0].dtype.scalar
        if dtype not in FLOATS:
            if dtype == tl.float64:
                return TensorHandle(op(*(a.data for a in args)), dtype)
            raise RefusedError(f"{name} on {dtype}: not defined; convert to fp16, bf16 or fp32")
        return TensorHandle(arithmetic.rounded(op, dtype, *(a.data for a in args)), dtype)

    def _contracts(self, *, multiplied: bool = False, added: bool = False) -> None:
        self.multiplied |= multiplied
        self.added |= added
        if self.fusion and self.multiplied and self.added:
            raise RefusedError(
                "this launch multiplies and adds floats, and lets the compiler contract them into "
                "fused operations: pass enable_fp_fusion=False at the launch and write tl.fma "
                "where a fused operation is meant"
            )

    def _create_fadd(self, a: TensorHandle, b: TensorHandle) -> Any:
        if a.attr.get("dot") or b.attr.get("dot"):
            raise RefusedError(
                "a value is added to a tl.dot whose accumulator is left out or a constant zero: "
                "the compiler feeds that value into the dot as its accumulator, which changes "
                "bits. Write acc = tl.dot(a, b, acc); to add after the dot, keep the dot in a loop "
                "whose bound is an argument of the kernel, not a constexpr"
            )
        self._contracts(added=True)
        return self._arithmetic("addition", np.add, a, b)

    def _create_fsub(self, a: TensorHandle, b: TensorHandle) -> Any:
        self._contracts(added=True)
        result = self._arithmetic("subtraction", np.subtract, a, b)
        result.attr["dot"] = a.attr.get("dot") and not b.data.any()  # x - 0 is folded away
        return result

    def _create_fmul(self, a: TensorHandle, b: TensorHandle) -> Any:
        self._contracts(multiplied=True)
        result = self._arithmetic("multiplication", np.multiply, a, b)
        # A factor that is the constant 1 is folded away, and the dot stands there bare.
        for x, one in ((a, b), (b, a)):
            if x.attr.get("dot") and (arithmetic.widen(one.data, one.dtype.scalar) == 1).all():
                result.attr["dot"] = True
        result.attr["outer"] = a.attr.get("broadcast") and b.attr.get("broadcast")
        return result

    def _create_precise_divf(self, a: TensorHandle, b: TensorHandle) -> Any:
        return self._arithmetic("tl.div_rn", np.divide, a, b)

    def _create_precise_sqrt(self, a: TensorHandle) -> Any:
        return self._arithmetic("tl.sqrt_rn", np.sqrt, a)

    def _create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> Any:
        dtype = z.dtype.scalar
        if dtype not in FLOATS:
            raise RefusedError(f"tl.fma on {dtype}: not modelled; use fp16, bf16 or fp32")
        return TensorHandle(arithmetic.fma(x.data, y.data, z.data, dtype), dtype)

    def _create_fneg(self, a: TensorHandle) -> Any:
        return TensorHandle(arithmetic.sign_flipped(a.data), a.dtype.scalar)

    def _create_fabs(self, a: TensorHandle) -> Any:
        return TensorHandle(arithmetic.sign_cleared(a.data), a.dtype.scalar)

    def _create_floor(self, a: TensorHandle) -> Any:
        return TensorHandle(arithmetic.integral(np.floor, a.data), a.dtype.scalar)

    def _create_ceil(self, a: TensorHandle) -> Any:
        return TensorHandle(arithmetic.integral(np.ceil, a.data), a.dtype.scalar)

    # Choosing one of two values

    def _extremum(self, a: TensorHandle, b: TensorHandle, largest: bool, propagate: bool) -> Any:
        dtype = a.dtype.scalar
        if dtype not in FLOATS:
            raise RefusedError(f"minimum or maximum of {dtype}: not modelled")
        data = arithmetic.extremum(a.data, b.data, dtype, largest=largest, propagate=propagate)
        return TensorHandle(data, dtype)

    def _create_minnumf(self, a: TensorHandle, b: TensorHandle) -> Any:
        return self._extremum(a, b, False, False)

    def _create_maxnumf(self, a: TensorHandle, b: TensorHandle) -> Any:
        return self._extremum(a, b, True, False)

    def _create_minimumf(self, a: TensorHandle, b: TensorHandle) -> Any:
        return self._extremum(a, b, False, True)

    def _create_maximumf(self, a: TensorHandle, b: TensorHandle) -> Any:
        return self._extremum(a, b, True, True)

    def _create_clampf(
        self, x: TensorHandle, low: TensorHandle, high: TensorHandle, propagate: Any
    ) -> Any:
        nan = propagate != ir.PROPAGATE_NAN.NONE
        value, least, most = (arithmetic.widen(h.data, x.dtype.scalar) for h in (x, low, high))
        symmetric = (least == -most).all()
        if self.facts.clamp_by_magnitude and symmetric and not nan and np.isnan(value).any():
            raise RefusedError(
                f"tl.clamp of NaN on {self.arch}: with constant limits -c and c the instruction "
                "gives c, otherwise the lower limit; replace NaN (tl.where) before the clamp"
            )
        return self._extremum(self._extremum(x, low, True, nan), high, False, nan)

    def _compare(self, method: Callable[..., TensorHandle], a: Any, b: Any) -> Any:
        return TensorHandle(method(a, b).data, tl.int1)  # Triton leaves the operands' type on it

    def _float_compare(self, op: Callable[..., Array], a: Any, b: Any) -> Any:
        dtype = a.dtype.scalar
        return TensorHandle(
            op(arithmetic.widen(a.data, dtype), arithmetic.widen(b.data, dtype)), tl.int1
        )

    # Conversions

    def _cast(self, source: TensorHandle, target: Any) -> Any:
        dtype, to = source.dtype.scalar, target.scalar
        if tl.float64 in (dtype, to):
            if "float64" not in self.allowed:
                raise RefusedError(
                    "tl.float64: not modelled; use tl.float32, or BITASSAY_ALLOW=float64"
                )
            return self.plain.cast_impl(source, target)
        for kind in (dtype, to):
            if not (kind in FLOATS or kind in FP8 or kind.is_int()):
                raise RefusedError(f"conversion {dtype} -> {to}: {kind} is not modelled")
        if dtype.is_int() and to.is_int():
            return self.plain.cast_impl(source, target)
        if dtype.is_int():
            data = arithmetic.integer_to_float(source.data, to, self.facts)
        elif to.is_int():
            data = arithmetic.float_to_integer(source.data, dtype, _get_np_dtype(to))
        else:
            data = arithmetic.convert_float(source.data, dtype, to)
        return TensorHandle(data, to)

    _create_si_to_fp = _create_ui_to_fp = _create_fp_to_si = _create_fp_to_ui = _cast
    _create_fp_ext = _create_fp_trunc = _cast

    def _create_fp_to_fp(self, source: TensorHandle, target: Any, rounding: Any) -> Any:
        widens = source.dtype.scalar.primitive_bitwidth < target.scalar.primitive_bitwidth
        if rounding not in (None, ir.ROUNDING_MODE.RTNE) and not widens:
            raise RefusedError(
                "conversion with fp_downcast_rounding other than 'rtne': not modelled; leave it out"
            )
        return self._cast(source, target)

    def _create_bitcast(self, source: TensorHandle, target: Any) -> Any:
        data = np.ascontiguousarray(source.data).view(_get_np_dtype(target))
        return TensorHandle(data.reshape(source.data.shape), target.scalar)
