"""Hardware facts per architecture: pure data, no arithmetic.

Sources: hardware vectors of Khattak and Mikaitis (A100, RTX 1000 Ada, H100); MMA-Sim
(arXiv 2511.10909) for the exponent floor of sm_8x, which no published vector tells apart; and
comparisons of every output on an H100, which settle the floor of sm_90.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Family = Literal["ampere", "hopper"]


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
class Emulation:
    """What Triton's compiler and the instructions do beside the tensor cores, for the emulator.

    fp8_by_wgmma: fp8 `tl.dot` is a wgmma that accumulates in fewer bits where the tile allows it,
    else it is widened to fp16 with a permuted K; where it is False, the tile changes no bit.
    bf16_from_integer: an integer is rounded to bf16 once, not by way of fp32. clamp_by_magnitude:
    `tl.clamp` with limits -c and c is one instruction, which makes c of NaN.
    """

    fp8_by_wgmma: bool
    bf16_from_integer: bool
    clamp_by_magnitude: bool


@dataclass(frozen=True)
class Arch:
    """One compute capability: its tensor cores per input type, None where it has none.

    fp32 inputs without a tensor core ("ieee") are one ascending chain of fused multiply-adds on
    every architecture. shared_memory: bytes a thread block may use. family: whose table of tiles
    kernels are launched by, None where they have none. trusts_cuda_graphs: whether decoding runs in
    CUDA graphs unless asked otherwise; below compute capability 9.0 an engine with compiled graphs
    gave other tokens than an eager one. emulation: None where the emulator does not know it.
    """

    name: str
    compute_capability: tuple[int, int]
    shared_memory: int
    bf16: TensorCore
    fp16: TensorCore
    tf32: TensorCore
    fp8_e4m3: TensorCore | None = None
    fp8_e5m2: TensorCore | None = None
    family: Family | None = None
    trusts_cuda_graphs: bool = False
    emulation: Emulation | None = None

    @property
    def contract_facts(self) -> dict[str, Any]:
        """The facts that belong to a contract, ready for JSON; others may be added beside them."""
        return {name: value for name, value in asdict(self).items() if name in _CONTRACT_FACTS}


# What a contract's digest covers. The rest decides how something runs, and no bit of a contract.
_CONTRACT_FACTS = (
    *("name", "compute_capability", "shared_memory"),
    *("bf16", "fp16", "tf32", "fp8_e4m3", "fp8_e5m2"),
)


# Ampere and Ada share one adder: a k16 instruction is two steps of 8 products, tf32 steps hold 4.
_AMPERE_16 = TensorCore(group=8, fraction_bits=24, exponent_floor=-132)
_AMPERE_TF32 = TensorCore(group=4, fraction_bits=24, exponent_floor=-132)
_ADA_FP8 = TensorCore(group=16, fraction_bits=13, exponent_floor=-132, result_fraction_bits=13)
# Hopper: mma.sync and wgmma agree bit for bit for 16-bit and tf32 inputs; fp8 as in wgmma.
_HOPPER_16 = TensorCore(group=16, fraction_bits=25, exponent_floor=-133)
_HOPPER_TF32 = TensorCore(group=8, fraction_bits=25, exponent_floor=-133)
_HOPPER_FP8 = TensorCore(group=32, fraction_bits=13, exponent_floor=-133, result_fraction_bits=13)

SM_80 = Arch("sm_80", (8, 0), 166_912, _AMPERE_16, _AMPERE_16, _AMPERE_TF32, family="ampere")
SM_86 = Arch("sm_86", (8, 6), 101_376, _AMPERE_16, _AMPERE_16, _AMPERE_TF32, family="ampere")
SM_89 = Arch(
    "sm_89",
    (8, 9),
    101_376,
    bf16=_AMPERE_16,
    fp16=_AMPERE_16,
    tf32=_AMPERE_TF32,
    fp8_e4m3=_ADA_FP8,
    fp8_e5m2=_ADA_FP8,
    family="ampere",
    emulation=Emulation(fp8_by_wgmma=False, bf16_from_integer=False, clamp_by_magnitude=False),
)
SM_90 = Arch(
    "sm_90",
    (9, 0),
    232_448,
    bf16=_HOPPER_16,
    fp16=_HOPPER_16,
    tf32=_HOPPER_TF32,
    fp8_e4m3=_HOPPER_FP8,
    fp8_e5m2=_HOPPER_FP8,
    family="hopper",
    trusts_cuda_graphs=True,
    emulation=Emulation(fp8_by_wgmma=True, bf16_from_integer=True, clamp_by_magnitude=True),
)

ARCHES: dict[str, Arch] = {arch.name: arch for arch in (SM_80, SM_86, SM_89, SM_90)}
EMULATED = tuple(name for name, arch in ARCHES.items() if arch.emulation is not None)


def get_arch(arch: str | Arch) -> Arch:
    """Return the record of an architecture given by name (``"sm_90"``) or as a record.

    Raises ValueError, listing the known names, for any other.
    """
    if isinstance(arch, Arch):
        return arch
    if arch not in ARCHES:
        raise ValueError(f"unknown architecture {arch!r}: known are {', '.join(ARCHES)}")
    return ARCHES[arch]


def emulation_of(arch: str | Arch) -> Emulation:
    """Return what the emulator knows of an architecture; ValueError where it knows nothing."""
    found = get_arch(arch)
    if found.emulation is None:
        raise ValueError(f"cannot emulate {found.name!r}: known are {', '.join(EMULATED)}")
    return found.emulation


def family_of(arch: str | Arch) -> Family:
    """Return whose tiles an architecture's kernels take; ValueError where it has none."""
    found = get_arch(arch)
    if found.family is None:
        known = ", ".join(name for name, record in ARCHES.items() if record.family)
        raise ValueError(f"no tile for architecture {found.name!r}: known are {known}")
    return found.family
