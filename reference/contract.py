"""The order contract: what fixes the bits of every operation, as frozen data with a digest.

An order depends on weight shapes and on the architecture, never on the batch. Change an order, a
rounding or a hardware fact and the digest changes; a test pins version -> digest.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from .arch import Arch, get_arch

CONTRACT_VERSION = 1

# The order of every operation, in words; part of the digest, so no order changes in silence.
ORDERS = {
    "embedding": "copy of one row per token",
    "linear": (
        "acc = +0; K ascending in tensor-core groups, acc feeds each step as c, tail group padded "
        "with zeros; fp32 acc + bias, nearest-even; then to the weight's type, nearest-even"
    ),
    "linear.fp32": "acc = +0; one fused multiply-add per k, ascending; acc + 0.0; then as linear",
    "lm_head": "linear; ids from vocab_size on are -inf",
    "greedy": "highest value, lowest id; -0 equals +0; NaN is an error",
    "top_k": "value descending, then id ascending",
}

# The operations whose output rows are fingerprinted, per model type, in the order they run.
_OPERATIONS = {"context-lm": ("embedding", "lm_head")}


@dataclass(frozen=True)
class Contract:
    """Everything that decides the bits besides the inputs.

    logits_dtype: "weight" rounds logits once to the weight's type, "float32" keeps fp32.
    """

    version: int
    arch: str
    logits_dtype: Literal["weight", "float32"] = "weight"

    @property
    def facts(self) -> dict[str, Any]:
        """The contract with the orders and hardware facts it stands on, ready for JSON."""
        return {"contract": asdict(self), "arch": asdict(get_arch(self.arch)), "orders": ORDERS}

    @property
    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON of `facts`."""
        text = json.dumps(self.facts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def default_contract(
    arch: str | Arch, *, logits_dtype: Literal["weight", "float32"] = "weight"
) -> Contract:
    """Return this version's contract for an architecture; ValueError for an unknown one."""
    if logits_dtype not in ("weight", "float32"):
        raise ValueError(f'logits_dtype is "weight" or "float32", found {logits_dtype!r}')
    return replace(Contract(CONTRACT_VERSION, get_arch(arch).name), logits_dtype=logits_dtype)


def operations(model_type: str) -> tuple[str, ...]:
    """Return the names of the fingerprinted operations of a model type, in running order."""
    if model_type not in _OPERATIONS:
        known = ", ".join(_OPERATIONS)
        raise ValueError(f"unknown model type {model_type!r}: known are {known}")
    return _OPERATIONS[model_type]
