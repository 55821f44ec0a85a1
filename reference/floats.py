"""Bit-level floating point: views, canonical NaN, one correct rounding, exact FMA."""

from __future__ import annotations

import torch
from torch import Tensor

from bitassay.reference.spec.dtypes import INTEGER_OF_BYTES, require_dtype

if float(torch.tensor(2.0**-126) * 0.5) == 0.0:
    raise RuntimeError(
        "this process flushes denormals to zero, so subnormal results would be wrong: call "
        "torch.set_flush_denormal(False) before importing bitassay.reference"
    )


def bits(x: Tensor) -> Tensor:
    """Return the bit patterns of x as signed integers of the same width, sharing its memory."""
    return x.view(INTEGER_OF_BYTES[x.element_size()])


def canonical_nan(x: Tensor) -> Tensor:
    """Return x (fp32, bf16, fp16) with every NaN replaced by NVIDIA's 0x7fffffff or 0x7fff.

    NVIDIA GPUs write this NaN; an x86 CPU writes others, so both rooms canonicalise. Raises
    TypeError for another dtype.
    """
    facts = require_dtype("result", x.dtype)
    nan = torch.tensor(facts.canonical_nan, dtype=facts.integer)
    return torch.where(x.isnan(), nan.to(x.device), bits(x)).view(x.dtype)


def exponent(x: Tensor) -> Tensor:
    """Return floor(log2(|x|)) of a float64 tensor as int64; -1023 for zero."""
    return (bits(x) >> 52 & 0x7FF) - 1023


def power_of_two(e: Tensor) -> Tensor:
    """Return 2**e as float64 for an int64 tensor with -1022 <= e <= 1023, from exponent bits."""
    return (e + 1023 << 52).view(torch.float64)


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round fp32 or fp64 once, to nearest-even, into dtype (bf16, fp16, fp32); canonical NaN.

    Written out because torch converts float64 to fp16 and bf16 through fp32, rounding twice.
    Raises TypeError for another dtype.
    """
    facts = require_dtype("result", dtype)
    if x.dtype == torch.float32 or dtype == torch.float32:
        return canonical_nan(x.to(dtype))  # one hardware conversion: RN
    finite = torch.where(x.isfinite(), x, 0.0)
    unit = power_of_two(exponent(finite).clamp_min(facts.least_exponent) - facts.fraction_bits)
    rounded = torch.round(finite / unit) * unit  # RN, ties to even; both scalings are exact
    return canonical_nan(torch.where(x.isfinite(), rounded, x).to(torch.float32).to(dtype))


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Return fp32(a * b + c) with a single rounding, to nearest-even; a, b, c broadcast fp32.

    The product is exact in float64. The sum is rounded to odd there, so that the cast to fp32
    rounds as if the sum had been exact (Boldo and Melquiond, "Emulation of a FMA").
    """
    product = a.double() * b.double()
    addend = c.double()
    total = product + addend
    virtual = total - product  # TwoSum: error is what total lost
    error = (product - (total - virtual)) + (addend - virtual)
    pattern = total.view(torch.int64)
    inexact = (error != 0) & (pattern & 1 == 0) & total.isfinite()
    away = (error > 0) == (total > 0)
    odd = torch.where(inexact, torch.where(away, pattern + 1, pattern - 1), pattern)
    return canonical_nan(odd.view(torch.float64).to(torch.float32))
