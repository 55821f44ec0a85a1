"""The tables of rotary embeddings: correctly rounded, so there is only one right answer.

Libraries disagree in the last bit of cos, sin and of powers, and engines keep whatever their build
gives. Here frequencies come from decimal arithmetic of 60 digits; cosine and sine from float64,
except where float64 is too close to the middle between two fp32 values to decide: there decimal
arithmetic decides. Pure data: both rooms read it.

Frequencies and Llama-3 scaling: "RoFormer" (arXiv 2104.09864) and the model card of Llama 3.1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import cached_property, lru_cache

import torch
from torch import Tensor

MOST_POSITIONS = 1 << 24  # fp32 counts no further

_DIGITS = 60
_PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620900")
# How far float64 cos and sin may be off, in ulps: libraries promise 1, none is beyond 2.
LIBRARY_ULPS = 8
_HALF = 1 << 28  # half an fp32 ulp, in float64 ulps of the same binade


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's slowing of low frequencies, as config.json's rope_scaling names its numbers."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class RotaryTable:
    """cos and sin [positions, head_dim / 2] in fp32 for base theta, with or without scaling.

    frequencies: theta**(-2i / head_dim), scaled, rounded once to fp32. angle: fp32 product of
    position and frequency, as engines form it. cos, sin: of that angle, correctly rounded.
    """

    theta: float
    head_dim: int
    positions: int
    scaling: Llama3Scaling | None = None

    @cached_property
    def frequencies(self) -> Tensor:  # [head_dim / 2]
        """The angle from one position to the next, fp32."""
        with localcontext(prec=_DIGITS):
            exact = [self._frequency(i) for i in range(self.head_dim // 2)]
            return torch.tensor([_nearest_fp32(f) for f in exact], dtype=torch.float32)

    @cached_property
    def cos(self) -> Tensor:  # [positions, head_dim / 2]
        """The cosines, fp32."""
        return _rounded(self._angles(), torch.cos, 0)

    @cached_property
    def sin(self) -> Tensor:  # [positions, head_dim / 2]
        """The sines, fp32."""
        return _rounded(self._angles(), torch.sin, 1)

    @property
    def digest(self) -> str:
        """sha256 (hex) of the bytes of cos, then sin."""
        tables = (self.cos, self.sin)
        data = [x.contiguous().view(torch.uint8).flatten().numpy().data for x in tables]
        return hashlib.sha256(b"".join(data)).hexdigest()

    def _angles(self) -> Tensor:
        positions = torch.arange(self.positions, dtype=torch.float32)
        return positions[:, None] * self.frequencies  # RN

    def _frequency(self, i: int) -> Decimal:
        plain = Decimal(self.theta) ** (Decimal(-2 * i) / self.head_dim)
        scaling = self.scaling
        if scaling is None:
            return plain
        factor, low = Decimal(scaling.factor), Decimal(scaling.low_freq_factor)
        high = Decimal(scaling.high_freq_factor)
        turns = scaling.original_max_position_embeddings * plain / (2 * _PI)
        if turns < low:  # longer than the original context: slowed in full
            return plain / factor
        if turns > high:
            return plain
        smooth = (turns - low) / (high - low)
        return (1 - smooth) * plain / factor + smooth * plain


@lru_cache(maxsize=4)
def rotary_table(
    theta: float, head_dim: int, positions: int, scaling: Llama3Scaling | None = None
) -> RotaryTable:
    """Return the tables, made once a process. Raises ValueError for sizes that make none."""
    if head_dim < 2 or head_dim % 2 or not 1 <= positions <= MOST_POSITIONS:
        raise ValueError(
            f"expected an even head size and 1 to {MOST_POSITIONS} positions (beyond, fp32 cannot "
            f"count), found {head_dim} and {positions}"
        )
    return RotaryTable(theta, head_dim, positions, scaling)


def _rounded(angles: Tensor, function: Callable[[Tensor], Tensor], shift: int) -> Tensor:
    """Round a function of fp32 angles to fp32, correctly; shift: 0 for cosine, 1 for sine."""
    wide = function(angles.double())
    result = wide.float()  # RN, right unless float64 is nearly in the middle between two values
    low = wide.view(torch.int64) & (1 << 29) - 1  # the bits that fp32 has no room for
    doubtful = (low - _HALF).abs() <= LIBRARY_ULPS
    # Below fp32's normal range the cast drops more bits than these.
    doubtful |= (wide.abs() < 2.0**-126) & (wide != 0)
    for place in doubtful.nonzero().tolist():
        with localcontext(prec=_DIGITS):
            exact = decimal_cosine(Decimal(float(angles[*place])) - shift * _PI / 2)
        result[*place] = _nearest_fp32(exact)
    return result


def decimal_cosine(x: Decimal) -> Decimal:
    """Return cos(x) by its Taylor series after reduction to [-pi, pi]."""
    x -= (x / (2 * _PI)).to_integral_value() * 2 * _PI
    term = total = Decimal(1)
    for n in range(2, 200, 2):
        term *= -x * x / (n * (n - 1))
        total += term
        if abs(term) < Decimal(10) ** (5 - _DIGITS):
            break
    return total


def _nearest_fp32(x: Decimal) -> float:
    """Round to fp32, to nearest-even, once."""
    exact = Fraction(x)
    if exact == 0:
        return 0.0
    exponent = max(math.frexp(float(exact))[1] - 24, -149)
    unit = Fraction(2) ** exponent
    return float(round(exact / unit) * unit)  # Python rounds a fraction to the even integer
