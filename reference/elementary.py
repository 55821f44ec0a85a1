"""exp2, exp, log and silu from polynomials in exact FMA: the same steps on a CPU and on a GPU.

Only operations that every IEEE machine rounds alike: +, -, *, FMA, division, shifts of the bits.
Errors, measured over every fp32 input, are in docs/contract.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitassay.reference.floats import bits, canonical_nan, fma
from bitassay.reference.spec.dtypes import FLOAT32
from bitassay.reference.spec.polynomials import EXP, EXP2, LN2_HI, LN2_LO, LOG1P, LOG2E, MAGIC

_ONE = FLOAT32.one
_SQRT_HALF = 0x3F3504F3  # the bits of the fp32 nearest to sqrt(1/2)


def exp2(x: Tensor) -> Tensor:
    """Return 2**x in fp32: +0 below -126 (so for -inf), +inf from 127.5 on, NaN for NaN.

    x: fp32, any shape. exp2(0) is exactly 1.
    """
    z = x + MAGIC  # RN to an integer, which stands in the low bits of z
    result = _horner(EXP2, x - (z - MAGIC)) * _power_of_two(z)  # RN: exact where it is normal
    result = torch.where(x < -126.0, 0.0, result)
    return canonical_nan(torch.where(x >= 127.5, torch.inf, result))


def exp(x: Tensor) -> Tensor:
    """Return e**x in fp32 for x <= 0: +0 below about -87.683 (where n < -126), NaN for NaN.

    x: fp32, any shape.
    """
    z = fma(x, _constant(x, LOG2E), _constant(x, MAGIC))  # RN to an integer, as in exp2
    n = z - MAGIC
    rest = fma(n, _constant(x, -LN2_HI), x)  # RN
    rest = fma(n, _constant(x, -LN2_LO), rest)  # RN
    result = _horner(EXP, rest) * _power_of_two(z)  # RN
    return canonical_nan(torch.where(n < -126.0, 0.0, result))


def log(x: Tensor) -> Tensor:
    """Return the natural logarithm in fp32 of finite fp32 values from 1 on, any shape."""
    exponent = bits(x) - _SQRT_HALF >> 23
    t = (bits(x) - (exponent << 23)).view(torch.float32) - 1.0  # exact
    k = exponent.float()
    result = fma(t * t, _horner(LOG1P, t), t)  # RN the square, RN the rest
    result = fma(k, _constant(x, LN2_LO), result)  # RN
    return fma(k, _constant(x, LN2_HI), result)  # RN


def silu(x: Tensor) -> Tensor:
    """Return x / (1 + e**-x) in fp32, written so that the exponential never overflows.

    x: fp32, any shape. silu(-inf) is NaN, as the product -inf * 0 is.
    """
    e = exp(-x.abs())
    numerator = torch.where(x >= 0.0, x, x * e)  # RN
    return canonical_nan(numerator / (1.0 + e))  # RN: torch divides fp32 correctly rounded


def _horner(coefficients: Sequence[float], x: Tensor) -> Tensor:
    result = _constant(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        result = fma(result, x, _constant(x, coefficient))  # RN
    return result


def _power_of_two(z: Tensor) -> Tensor:
    """Return 2**n for z = n + MAGIC; where n is no exponent of fp32, anything."""
    return ((bits(z) << 23) + _ONE).view(torch.float32)


def _constant(like: Tensor, value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=like.device)
