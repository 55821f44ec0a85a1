"""exp2, exp, silu and log for use inside kernels: polynomials in fused multiply-adds.

Only additions, multiplications, `tl.fma`, `tl.div_rn` and integer operations on the exponent, each
rounded once, so that every architecture and the reference agree. fp32 in, fp32 out, any shape.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bitassay.reference.spec import polynomials
from bitassay.reference.spec.dtypes import FLOAT32

_MAGIC = tl.constexpr(polynomials.MAGIC)
_LOG2E = tl.constexpr(polynomials.LOG2E)
_LN2_HI = tl.constexpr(polynomials.LN2_HI)
_LN2_LO = tl.constexpr(polynomials.LN2_LO)
_MINUS_LN2_HI = tl.constexpr(-polynomials.LN2_HI)
_MINUS_LN2_LO = tl.constexpr(-polynomials.LN2_LO)
_EXP2 = tl.constexpr(polynomials.EXP2)
_EXP = tl.constexpr(polynomials.EXP)
_LOG1P = tl.constexpr(polynomials.LOG1P)
_ROOT_HALF = tl.constexpr(0x3F3504F3)  # the bits of sqrt(1/2)
_ONE = tl.constexpr(FLOAT32.one)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _horner(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    """Return the polynomial in x, from its highest coefficient down, one rounding a step."""
    p = tl.full(x.shape, COEFFICIENTS[DEGREE], tl.float32)
    for i in tl.static_range(DEGREE):
        p = tl.fma(p, x, COEFFICIENTS[DEGREE - 1 - i])
    return p


@triton.jit
def _times_power(p, z):
    """Return p * 2**n, where z = n + MAGIC holds n in its low bits."""
    exponent = (z.to(tl.int32, bitcast=True) << 23) + _ONE
    return p * exponent.to(tl.float32, bitcast=True)


@triton.jit
def exp2(x):
    """Return 2**x: +0 below -126, +inf from 127.5 on, exactly 1 at ±0."""
    z = x + _MAGIC
    f = x - (z - _MAGIC)
    r = _times_power(_horner(f, _EXP2, 6), z)
    return tl.where(x < -126.0, 0.0, tl.where(x >= 127.5, _INFINITY, r))


@triton.jit
def exp2_nonpositive(x):
    """Return exp2 of x <= 0 or NaN: without the upper limit, which it does not reach."""
    z = x + _MAGIC
    r = _times_power(_horner(x - (z - _MAGIC), _EXP2, 6), z)
    return tl.where(x < -126.0, 0.0, r)


@triton.jit
def exp(x):
    """Return e**x for x <= 0: +0 where n < -126, that is below about -87.683."""
    z = tl.fma(x, _LOG2E, _MAGIC)
    n = z - _MAGIC
    r = tl.fma(n, _MINUS_LN2_HI, x)
    r = tl.fma(n, _MINUS_LN2_LO, r)
    return tl.where(n < -126.0, 0.0, _times_power(_horner(r, _EXP, 6), z))


@triton.jit
def silu(x):
    """Return x / (1 + e**-x), arranged so that the exponent is never positive."""
    e = exp(tl.abs(x) * -1.0)  # -x would be 0 - x; this flips the sign of zeros as well
    return tl.div_rn(tl.where(x >= 0.0, x, x * e), e + 1.0)


@triton.jit
def log(x):
    """Return the natural logarithm of a finite normal x >= 1."""
    pattern = x.to(tl.int32, bitcast=True)
    k = (pattern - _ROOT_HALF) >> 23
    t = (pattern - (k << 23)).to(tl.float32, bitcast=True) - 1.0  # x = 2**k * (1 + t)
    y = tl.fma(t * t, _horner(t, _LOG1P, 8), t)
    kf = k.to(tl.float32)
    return tl.fma(kf, _LN2_HI, tl.fma(kf, _LN2_LO, y))
