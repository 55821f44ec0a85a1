"""Rotary tables by mpmath at 60 digits: another library, and the scaling by wavelengths."""

from __future__ import annotations

import mpmath

from support.naive import tensor_core as twin
from support.naive.tensor_core import FP32, fma, round_nearest

mp = mpmath.mp.clone()  # with digits of its own
mp.dps = 60


def to_fp32(x: mpmath.mpf) -> int:
    """The bits of a number of 60 digits as fp32: one rounding."""
    sign, mantissa, exponent, _ = x._mpf_
    magnitude = mantissa << (exponent + twin.UNIT)
    return round_nearest(-magnitude if sign else magnitude, FP32)


def value(bits: int) -> mpmath.mpf:
    """The number that a finite fp32 is, exactly."""
    return mp.ldexp(mp.mpf(twin.decode(bits, FP32).signed), -twin.UNIT)


def frequency(i: int, theta: float, head_dim: int, scaling: dict[str, float] | None) -> int:
    """Bits of the i-th frequency; scaling under config.json's names, as Llama 3.1 has it."""
    plain = mp.mpf(theta) ** (mp.mpf(-2 * i) / head_dim)
    if scaling is None:
        return to_fp32(plain)
    context, factor = scaling["original_max_position_embeddings"], mp.mpf(scaling["factor"])
    low, high = mp.mpf(scaling["low_freq_factor"]), mp.mpf(scaling["high_freq_factor"])
    wavelength = 2 * mp.pi / plain
    if wavelength < context / high:
        return to_fp32(plain)
    if wavelength > context / low:
        return to_fp32(plain / factor)
    smooth = (context / wavelength - low) / (high - low)
    return to_fp32((1 - smooth) * plain / factor + smooth * plain)


def cosine_and_sine(position: int, of_position: int) -> tuple[int, int]:
    """Bits of the cosine and sine of fp32(position) * frequency, given the frequency's bits."""
    position_bits = round_nearest(position << twin.UNIT, FP32)
    angle = value(fma(position_bits, of_position, 0))
    return to_fp32(mp.cos(angle)), to_fp32(mp.sin(angle))
