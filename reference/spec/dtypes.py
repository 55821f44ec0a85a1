"""The floating-point dtypes: what their bits mean, and what each may be in the contract.

Whoever needs a pattern or asks which dtypes an operation takes asks this table, in every room. It
imports torch, so what the command's help needs (contract, arch) does not import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

# What a dtype may be. transformer: weights and rows of a Llama, a Qwen3 or a draft head, their keys
# and values. weight: of a linear layer, an lm_head, an embedding, so of context-lm; what a file may
# hold. logits: what tokens are chosen by. result: what arithmetic rounds to, with a canonical NaN
# and so with a fingerprint.
Role = Literal["transformer", "weight", "logits", "result"]

# Signed integers by their bytes: what the bits of a float are viewed as.
INTEGER_OF_BYTES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class DType:
    """One dtype: a sign, an exponent and a fraction in `bits` bits.

    least_exponent: of normal numbers; subnormals keep it. largest: the largest finite value.
    infinity: the pattern of +inf, None for a dtype without one. canonical_nan: the one pattern that
    NVIDIA GPUs write for every NaN, None where nothing here rounds to the dtype. tensor_core: the
    field of `arch.Arch` that multiplies it. roles: see `Role`.
    """

    name: str
    dtype: torch.dtype
    bits: int
    fraction_bits: int
    least_exponent: int
    largest: float
    infinity: int | None
    canonical_nan: int | None
    tensor_core: str
    roles: frozenset[Role]

    @property
    def integer(self) -> torch.dtype:
        """The signed integer of the same width, as which its bits are viewed."""
        return INTEGER_OF_BYTES[self.bits // 8]

    @property
    def magnitude(self) -> int:
        """The mask of every bit but the sign."""
        return (1 << self.bits - 1) - 1

    @property
    def last_number(self) -> int:
        """The last pattern, sign aside, that is no NaN: infinity's, where there is one."""
        return self.magnitude - 1 if self.infinity is None else self.infinity

    @property
    def exponent_field(self) -> int:
        """The mask of the exponent's bits."""
        return self.magnitude >> self.fraction_bits << self.fraction_bits

    @property
    def one(self) -> int:
        """The pattern of 1.0: its exponent is 0, and the field of the least normal one holds 1."""
        return 1 - self.least_exponent << self.fraction_bits


_EVERY_ROLE: frozenset[Role] = frozenset(("transformer", "weight", "logits", "result"))

BFLOAT16 = DType(
    "bfloat16",
    torch.bfloat16,
    bits=16,
    fraction_bits=7,
    least_exponent=-126,
    largest=float.fromhex("0x1.fep127"),
    infinity=0x7F80,
    canonical_nan=0x7FFF,
    tensor_core="bf16",
    roles=_EVERY_ROLE,
)
FLOAT16 = DType(
    "float16",
    torch.float16,
    bits=16,
    fraction_bits=10,
    least_exponent=-14,
    largest=65504.0,
    infinity=0x7C00,
    canonical_nan=0x7FFF,
    tensor_core="fp16",
    roles=_EVERY_ROLE,
)
FLOAT32 = DType(
    "float32",
    torch.float32,
    bits=32,
    fraction_bits=23,
    least_exponent=-126,
    largest=float.fromhex("0x1.fffffep127"),
    infinity=0x7F800000,
    canonical_nan=0x7FFFFFFF,
    tensor_core="tf32",  # with its fraction cut; linear layers take chains of fma instead
    roles=_EVERY_ROLE - {"transformer"},
)
FLOAT8_E4M3FN = DType(
    "float8_e4m3fn",
    torch.float8_e4m3fn,
    bits=8,
    fraction_bits=3,
    least_exponent=-6,
    largest=448.0,
    infinity=None,
    canonical_nan=None,
    tensor_core="fp8_e4m3",
    roles=frozenset(),
)
FLOAT8_E5M2 = DType(
    "float8_e5m2",
    torch.float8_e5m2,
    bits=8,
    fraction_bits=2,
    least_exponent=-14,
    largest=57344.0,
    infinity=0x7C,
    canonical_nan=None,
    tensor_core="fp8_e5m2",
    roles=frozenset(),
)

DTYPES: dict[torch.dtype, DType] = {
    record.dtype: record for record in (BFLOAT16, FLOAT16, FLOAT32, FLOAT8_E4M3FN, FLOAT8_E5M2)
}


def with_role(role: Role) -> tuple[DType, ...]:
    """Return the dtypes that play a role, in the table's order."""
    return tuple(record for record in DTYPES.values() if role in record.roles)


def has_role(dtype: torch.dtype, role: Role) -> bool:
    """Return whether a dtype, known or not, plays a role."""
    record = DTYPES.get(dtype)
    return record is not None and role in record.roles


def listed(role: Role) -> str:
    """Return the dtypes that play a role for an error: "bfloat16, float16 or float32"."""
    *names, last = (record.name for record in with_role(role))
    return f"{', '.join(names)} or {last}" if names else last


def require_dtype(role: Role, /, *dtypes: torch.dtype, **named: torch.dtype) -> DType:
    """Return the record of the one dtype given, as often as it is, that plays a role.

    named: dtypes with the names of the tensors that have them, for the error. Raises TypeError
    unless all are one dtype and that plays the role.
    """
    different = {*dtypes, *named.values()}
    if len(different) == 1:
        record = DTYPES.get(next(iter(different)))
        if record is not None and role in record.roles:
            return record
    one = "one dtype of " if len(dtypes) + len(named) > 1 else ""
    found = [*map(str, dtypes), *(f"{name} {dtype}" for name, dtype in named.items())]
    raise TypeError(f"expected {one}{listed(role)}, found {', '.join(found)}")
