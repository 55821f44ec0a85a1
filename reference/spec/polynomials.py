"""Coefficients and constants of the elementary functions: pure data, part of the contract's digest.

Every number is exact in fp32. The coefficients, lowest first, fit 2**x on [-1/2, 1/2], e**x on
[-ln2/2, ln2/2] and log(1 + t) on [sqrt(1/2) - 1, sqrt(2) - 1] by relative error in the
least-squares sense. Each was rounded to fp32 before the next was fitted; the fit's own error stays
below 0.08 of an fp32 ulp. What the functions lose as computed is in docs/contract.md.
"""

from __future__ import annotations

# Adding it rounds |x| < 2**22 to an integer, to nearest-even, and leaves that integer in the low
# bits of the sum. 1.5 * 2**23.
MAGIC = 12582912.0
LOG2E = float.fromhex("0x1.715476p+0")
# ln 2 in two parts: the first 24 bits, and what they leave out.
LN2_HI = float.fromhex("0x1.62e430p-1")
LN2_LO = float.fromhex("-0x1.05c610p-29")

# 2**f = sum of EXP2[i] * f**i. The first is 1, so exp2(0) is exactly 1.
EXP2 = tuple(
    map(
        float.fromhex,
        "1 0x1.62e430p-1 0x1.ebfbd8p-3 0x1.c6af78p-5 0x1.3b30b0p-7 0x1.5f0a66p-10 "
        "0x1.3f906cp-13".split(),
    )
)
# e**r = sum of EXP[i] * r**i.
EXP = tuple(
    map(
        float.fromhex,
        "1 1 0x1.fffff8p-2 0x1.55548ep-3 0x1.555b96p-5 0x1.123bd0p-7 0x1.685352p-10".split(),
    )
)
# log(1 + t) = t + t**2 * sum of LOG1P[i] * t**i.
LOG1P = tuple(
    map(
        float.fromhex,
        "-0x1.fffff8p-2 0x1.555558p-2 -0x1.000434p-2 0x1.99a01ep-3 -0x1.542234p-3 0x1.22b78ap-3 "
        "-0x1.0fa6bep-3 0x1.06bfb4p-3 -0x1.3265eap-4".split(),
    )
)

# log2(e) / sqrt(head_dim), rounded once: what scores are multiplied by so that exp2 is enough.
SOFTMAX_SCALE = {64: float.fromhex("0x1.715476p-3"), 128: float.fromhex("0x1.0527dcp-3")}
