"""The order contract: what fixes the bits of every operation, as frozen data with a digest.

An order depends on weight shapes and on the architecture, never on the batch. Change an order, a
rounding or a hardware fact and the digest changes; a test pins version -> digest.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from bitassay.reference.spec import polynomials
from bitassay.reference.spec.arch import Arch, get_arch
from bitassay.reference.spec.operations import ORDERS
from bitassay.reference.spec.running_order import (
    DRAFT_KINDS,
    MODEL_TYPES,
    draft_operations,
    operations,
)

__all__ = [
    "CONTRACT_VERSION",
    "DRAFT_DEPTH",
    "DRAFT_KINDS",
    "MODEL_TYPES",
    "ORDERS",
    "Contract",
    "default_contract",
    "draft_operations",
    "operations",
]

CONTRACT_VERSION = 3

DRAFT_DEPTH = 5  # tokens drafted in a round at most: a golden records no more


@dataclass(frozen=True)
class Contract:
    """Everything that decides the bits besides the inputs.

    logits_dtype: "weight" rounds logits once to the weight's type, "float32" keeps fp32.
    key_block: keys that one step of the online softmax takes. key_split: keys after which
    attention starts a new partial sum. sum_width: columns of one tree in log_softmax.
    """

    version: int
    arch: str
    logits_dtype: Literal["weight", "float32"] = "weight"
    key_block: int = 64
    key_split: int = 1024
    sum_width: int = 4096

    @property
    def facts(self) -> dict[str, Any]:
        """The contract with the orders and hardware facts it stands on, ready for JSON."""
        return {
            "contract": asdict(self),
            "arch": get_arch(self.arch).contract_facts,
            "orders": ORDERS,
            "polynomials": POLYNOMIALS,
        }

    @property
    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON of `facts`."""
        text = json.dumps(self.facts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


# As hex floats, so that the digest covers every bit.
POLYNOMIALS = {
    "MAGIC": polynomials.MAGIC.hex(),
    "LOG2E": polynomials.LOG2E.hex(),
    "LN2_HI": polynomials.LN2_HI.hex(),
    "LN2_LO": polynomials.LN2_LO.hex(),
    "EXP2": [c.hex() for c in polynomials.EXP2],
    "EXP": [c.hex() for c in polynomials.EXP],
    "LOG1P": [c.hex() for c in polynomials.LOG1P],
    "SOFTMAX_SCALE": {str(d): c.hex() for d, c in polynomials.SOFTMAX_SCALE.items()},
}


def default_contract(
    arch: str | Arch,
    *,
    logits_dtype: Literal["weight", "float32"] = "weight",
    key_block: int = 64,
    key_split: int = 1024,
    sum_width: int = 4096,
) -> Contract:
    """Return this version's contract for an architecture; ValueError for an unknown one.

    key_block is 16, 32, 64 or 128, key_split a multiple of it, sum_width a power of two from 16 on;
    other values than the defaults make another contract, with another digest.
    """
    if logits_dtype not in ("weight", "float32"):
        raise ValueError(f'logits_dtype is "weight" or "float32", found {logits_dtype!r}')
    if key_block not in (16, 32, 64, 128):
        raise ValueError(f"key_block is 16, 32, 64 or 128, found {key_block!r}")
    if key_split < key_block or key_split % key_block:
        raise ValueError(f"key_split is a multiple of key_block {key_block}, found {key_split!r}")
    if sum_width < 16 or sum_width & sum_width - 1:
        raise ValueError(f"sum_width is a power of two from 16 on, found {sum_width!r}")
    return Contract(
        CONTRACT_VERSION, get_arch(arch).name, logits_dtype, key_block, key_split, sum_width
    )
