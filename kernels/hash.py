"""What an element adds to its row's fingerprint: a mixture of its place and its pattern."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def mix(x):  # 64 bits -> uint64
    """splitmix64's finaliser (Steele, Lea and Flood, 2014)."""
    x = x.to(tl.uint64)  # so that shifts bring zeros
    return _rest(x ^ (x >> 30))


@triton.jit
def mix_16(place, pattern):  # uint32 below 2^30, uint32 below 2^16 -> uint64
    """Return mix(place << 32 | pattern): its first step reaches the lower word alone."""
    return _rest((place.to(tl.uint64) << 32) | (pattern ^ (place << 2)).to(tl.uint64))


@triton.jit
def _rest(x):
    x = x.to(tl.uint64) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)
