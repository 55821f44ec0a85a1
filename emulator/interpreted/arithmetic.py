"""Floating point as the GPU does it, on the arrays of Triton's interpreter.

The interpreter keeps bf16 as uint16 and everything else in NumPy's own type. NumPy's fp32 and
fp16 add, subtract, multiply, divide and take roots correctly rounded; bf16 goes through fp32,
which rounds twice to the same result because 24 >= 2 * 8 + 2 (and below the normal range every
sum, and every product that matters, is exact in fp32). The GPU writes one NaN, so a result that is
a NaN becomes that one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray

from bitassay.emulator.errors import EmulationError, RefusedError
from bitassay.reference import floats
from bitassay.reference.spec.arch import Emulation
from bitassay.reference.spec.dtypes import BFLOAT16, FLOAT16, FLOAT32

Array = NDArray[Any]

FLOATS = {tl.bfloat16, tl.float16, tl.float32}
FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
_TORCH = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float32: torch.float32}
# What a conversion makes of NaN, whatever its payload was.
_NANS = {
    tl.bfloat16: BFLOAT16.canonical_nan or 0,
    tl.float16: FLOAT16.canonical_nan or 0,
    tl.float32: FLOAT32.canonical_nan or 0,
}
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def check_subnormals() -> None:
    """Raise EmulationError where this thread flushes subnormals to zero; the GPU keeps them."""
    if (np.array([1], np.int32).view(np.float32) * np.float32(1)).view(np.int32)[0] != 1:
        raise EmulationError(
            "subnormal numbers are flushed to zero in this process: call "
            "torch.set_flush_denormal(False) and load no library built with -ffast-math"
        )


def to_torch(data: Array, dtype: tl.dtype) -> torch.Tensor:
    """Return a copy of an interpreter array as a tensor of its own type (bf16, fp8 included)."""
    tensor = torch.from_numpy(np.array(data, order="C"))
    if dtype == tl.bfloat16:
        return tensor.view(torch.bfloat16)
    return tensor.view(FP8[dtype]) if dtype in FP8 else tensor


def from_torch(tensor: torch.Tensor) -> Array:
    """Return a tensor as an interpreter array: bf16 becomes uint16."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy()


def widen(data: Array, dtype: tl.dtype) -> Array:
    """Return bf16 as fp32, exactly; other types as they are."""
    if dtype != tl.bfloat16:
        return data
    return (data.astype(np.uint32) << 16).view(np.float32)


def narrow(data: Array, dtype: tl.dtype) -> Array:
    """Round fp32 (or fp16, fp32 as they are) to a type, to nearest-even, NaN canonical."""
    if dtype == tl.bfloat16:
        bits = data.astype(np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16  # RN, ties to even; carries to infinity
        return np.where(np.isnan(data), _NANS[tl.bfloat16], rounded).astype(np.uint16)
    np_type = np.float16 if dtype == tl.float16 else np.float32
    unsigned = np.uint16 if dtype == tl.float16 else np.uint32
    nan = unsigned(_NANS[tl.float16 if dtype == tl.float16 else tl.float32]).view(np_type)
    return np.where(np.isnan(data), nan, data.astype(np_type)).astype(np_type, copy=False)


def rounded(operation: Callable[..., Array], dtype: tl.dtype, *data: Array) -> Array:
    """Apply a correctly rounded NumPy operation in a type: one rounding to that type."""
    return narrow(operation(*(widen(d, dtype) for d in data)), dtype)


def fma(x: Array, y: Array, z: Array, dtype: tl.dtype) -> Array:
    """Return x * y + z with one rounding to dtype."""
    a, b, c = (torch.from_numpy(np.array(widen(d, dtype))) for d in (x, y, z))
    if dtype == tl.float32:
        return from_torch(floats.fma(a, b, c))
    # The product of two 16-bit floats is exact in float64; round its sum to odd there, so that
    # the last rounding decides alone.
    product, addend = a.double() * b.double(), c.double()
    total = product + addend
    virtual = total - product
    error = (product - (total - virtual)) + (addend - virtual)
    pattern = total.view(torch.int64)
    inexact = (error != 0) & (pattern & 1 == 0) & total.isfinite()
    step = torch.where((error > 0) == (total > 0), 1, -1)
    odd = torch.where(inexact, pattern + step, pattern).view(torch.float64)
    return from_torch(floats.round_to(odd, _TORCH[dtype]))


def extremum(x: Array, y: Array, dtype: tl.dtype, *, largest: bool, propagate: bool) -> Array:
    """Return PTX's min or max: -0 below +0; a NaN loses, or with `propagate` wins."""
    a, b = widen(x, dtype), widen(y, dtype)
    wins, negative = (a > b, np.signbit(b)) if largest else (a < b, np.signbit(a))
    first = np.where(a == b, negative, wins)
    result = np.where(np.isnan(a), y, np.where(np.isnan(b) | first, x, y))
    nan = np.isnan(a) | np.isnan(b) if propagate else np.isnan(a) & np.isnan(b)
    return np.where(nan, narrow(np.full((), np.nan, np.float32), dtype), result).astype(x.dtype)


def integral(operation: Callable[[Array], Array], data: Array) -> Array:
    """Return floor or ceil of fp32 as libdevice does: subnormal inputs count as zeros."""
    tiny = np.abs(data) < np.float32(2.0**-126)  # cvt.rmi.ftz.f32.f32
    return narrow(operation(np.where(tiny, np.copysign(np.float32(0), data), data)), tl.float32)


def sign_flipped(data: Array) -> Array:
    """Return -x by its sign bit."""
    unsigned = _UNSIGNED[data.itemsize]
    flipped: Array = data.view(unsigned) ^ unsigned(1 << (8 * data.itemsize - 1))
    return flipped.view(data.dtype)


def sign_cleared(data: Array) -> Array:
    """Return |x| by its sign bit."""
    unsigned = _UNSIGNED[data.itemsize]
    cleared: Array = data.view(unsigned) & unsigned((1 << (8 * data.itemsize - 1)) - 1)
    return cleared.view(data.dtype)


def convert_float(data: Array, source: tl.dtype, target: tl.dtype) -> Array:
    """Convert between float types with one rounding to nearest-even."""
    if target in FP8:
        return _to_fp8(widen(data, source).astype(np.float32), target)
    if source in FP8:
        return narrow(to_torch(data, source).float().numpy(), target)  # exact
    if (source, target) == (tl.bfloat16, tl.float32):
        return widen(data, source)  # a shift: it alone keeps what a NaN carries
    return narrow(widen(data, source), target)


def _to_fp8(data: Array, target: tl.dtype) -> Array:
    """Convert fp32 values that the fp8 format holds; refuse to round."""
    wide = torch.from_numpy(np.array(data))
    small = wide.to(FP8[target])
    if not torch.equal(small.float().view(torch.int32), wide.view(torch.int32)):
        raise RefusedError(
            f"conversion to {target}: how often it rounds depends on the architecture and on "
            "Triton's version; convert to fp8 outside the kernel"
        )
    return small.view(torch.uint8).numpy()


def integer_to_float(data: Array, target: tl.dtype, facts: Emulation) -> Array:
    """Convert integers (or booleans) to a float type as the architecture's cvt does."""
    if target == tl.float32:
        return data.astype(np.float32)  # RN
    if target == tl.bfloat16 and not facts.bf16_from_integer:
        return narrow(data.astype(np.float32), target)  # rounds twice: cvt.rn.f32, cvt.rn.bf16
    wide = torch.from_numpy(_to_odd(data))
    return from_torch(floats.round_to(wide, _TORCH[target]))


def _to_odd(data: Array) -> Array:
    """Return integers as float64, those of more than 53 bits rounded to odd."""
    if data.dtype.itemsize < 8:
        return data.astype(np.float64)
    short = (data >> 11 | (data & 2047 != 0)).astype(np.float64) * 2048.0
    exact = data.astype(np.float64)
    return np.where(np.abs(exact) < 2.0**53, exact, short)


def float_to_integer(data: Array, source: tl.dtype, target: np.dtype) -> Array:
    """Truncate to an integer type; values it cannot hold are refused, their result is undefined."""
    wide = np.trunc(widen(data, source).astype(np.float64))
    limits = np.iinfo(target)
    fits = (wide >= float(limits.min)) & (wide < float(limits.max) + (target.itemsize < 8))
    if not fits.all():
        bad = widen(data, source)[~fits].flat[0]
        raise RefusedError(
            f"conversion {source} -> {target}: {bad!r} does not fit, the result is undefined; "
            "replace such values (tl.where) before the conversion"
        )
    return wide.astype(target)
