"""Hardware facts per architecture: pure data, no arithmetic.

Sources: hardware vectors of Khattak and Mikaitis (A100, RTX 1000 Ada, H100); MMA-Sim
(arXiv 2511.10909) for the exponent floor of sm_8x, which no published vector tells apart; and
comparisons of every output on an H100, which settle the floor of sm_90.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorCore:
    """How one step ``d = c + sum(a_i * b_i)`` of a tensor core adds.

    group: products added at once. fraction_bits: bits kept below the largest exponent, the rest
    of every term is cut off. exponent_floor: least exponent the terms are aligned to.
    result_fraction_bits: fraction bits of the result; 23 is all of fp32.
    """

    group: int
    fraction_bits: int
    exponent_floor: int
    result_fraction_bits: int = 23


@dataclass(frozen=True)
class Arch:
    """One compute capability: its tensor cores per input type, None where it has none.

    fp32 inputs without a tensor core ("ieee") are one ascending chain of fused multiply-adds on
    every architecture. shared_memory: bytes a thread block may use.
    """

    name: str
    compute_capability: tuple[int, int]
    shared_memory: int
    bf16: TensorCore
    fp16: TensorCore
    tf32: TensorCore
    fp8_e4m3: TensorCore | None = None
    fp8_e5m2: TensorCore | None = None


# Ampere and Ada share one adder: a k16 instruction is two steps of 8 products, tf32 steps hold 4.
_AMPERE_16 = TensorCore(group=8, fraction_bits=24, exponent_floor=-132)
_AMPERE_TF32 = TensorCore(group=4, fraction_bits=24, exponent_floor=-132)
_ADA_FP8 = TensorCore(group=16, fraction_bits=13, exponent_floor=-132, result_fraction_bits=13)
# Hopper: mma.sync and wgmma agree bit for bit for 16-bit and tf32 inputs; fp8 as in wgmma.
_HOPPER_16 = TensorCore(group=16, fraction_bits=25, exponent_floor=-133)
_HOPPER_TF32 = TensorCore(group=8, fraction_bits=25, exponent_floor=-133)
_HOPPER_FP8 = TensorCore(group=32, fraction_bits=13, exponent_floor=-133, result_fraction_bits=13)

SM_80 = Arch("sm_80", (8, 0), 166_912, _AMPERE_16, _AMPERE_16, _AMPERE_TF32)
SM_86 = Arch("sm_86", (8, 6), 101_376, _AMPERE_16, _AMPERE_16, _AMPERE_TF32)
SM_89 = Arch("sm_89", (8, 9), 101_376, _AMPERE_16, _AMPERE_16, _AMPERE_TF32, _ADA_FP8, _ADA_FP8)
SM_90 = Arch(
    "sm_90", (9, 0), 232_448, _HOPPER_16, _HOPPER_16, _HOPPER_TF32, _HOPPER_FP8, _HOPPER_FP8
)

ARCHES: dict[str, Arch] = {arch.name: arch for arch in (SM_80, SM_86, SM_89, SM_90)}


def get_arch(arch: str | Arch) -> Arch:
    """Return the record of an architecture given by name (``"sm_90"``) or as a record.

    Raises ValueError, listing the known names, for any other.
    """
    if isinstance(arch, Arch):
        return arch
    if arch not in ARCHES:
        raise ValueError(f"unknown architecture {arch!r}: known are {', '.join(ARCHES)}")
    return ARCHES[arch]
