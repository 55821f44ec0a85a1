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

CONTRACT_VERSION = 3

# The order of every operation, in words; part of the digest, so no order changes in silence.
ORDERS = {
    "embedding": "copy of one row per token",
    "linear": (
        "acc = +0; K ascending in tensor-core groups, acc feeds each step as c, tail group padded "
        "with zeros; fp32 acc + bias, nearest-even; then to the weight's type, nearest-even"
    ),
    "linear.fp32": "acc = +0; one fused multiply-add per k, ascending; acc + 0.0; then as linear",
    "lm_head": "linear; ids from vocab_size on are -inf",
    "tree_sum": "padded with +0 to a power of two; element i plus element i + n/2, top down",
    "exp2": (
        "z = x + MAGIC, n = z - MAGIC, f = x - n; Horner of EXP2 in fma; times 2**n; +0 below "
        "-126, +inf from 127.5"
    ),
    "exp": (
        "x <= 0: z = fma(x, LOG2E, MAGIC), n = z - MAGIC, r = fma(n, -LN2_HI, x), "
        "r = fma(n, -LN2_LO, r); Horner of EXP in fma; times 2**n; +0 where n < -126"
    ),
    "log": (
        "x >= 1 = 2**k * (1 + t), 1 + t in [sqrt(1/2), sqrt(2)); q = Horner of LOG1P in fma; "
        "fma(t * t, q, t), then fma(k, LN2_LO, .), then fma(k, LN2_HI, .)"
    ),
    "rms_norm": (
        "fp32 h * h; tree_sum; / D; + eps; sqrt; h / rms; * weight; all nearest-even in fp32, then "
        "to the weight's type"
    ),
    "add_rms_norm": "fp32 x + residual to the weight's type: the new residual, and h of rms_norm",
    "rotary": (
        "fp32 fma(x1, cos, -(x2 * sin)) and fma(x2, cos, x1 * sin), then to x's type; halves of a "
        "head; frequencies correctly rounded, angle = fp32 position * frequency, its cosine and "
        "sine correctly rounded"
    ),
    "silu_and_mul": (
        "e = exp(-|g|); (g if g >= 0 else g * e) / (1 + e); * up in fp32, then to the gate's type"
    ),
    "attention": (
        "key blocks ascending: s = q k as linear without rounding; t = s * SOFTMAX_SCALE; -inf "
        "after the query; m = max; p = exp2(t - m); l = fma(l, exp2(m_old - m), tree_sum(p)); "
        "acc = p to v's type times v, fed by acc * exp2(m_old - m); m of -inf counts as 0 in exp2"
    ),
    "attention.splits": (
        "key splits ascending: L = fma(L, a, l * b), A = fma(A, a, acc * b), a = exp2(M_old - M), "
        "b = exp2(m - M); A / L + 0.0, then to v's type"
    ),
    "log_softmax": (
        "d = x - max; tree_sum(exp(d)) of each sum_width columns, added ascending; d - log(sum)"
    ),
    "residual_add": "fp32 x + residual, then to their type, nearest-even",
    "eagle": (
        "x = linear fc of [embedding(id), norm row]; residual = x, no input norm; qkv, rotary, "
        "attention, o_proj, add_rms_norm, gate_up, silu_and_mul, down_proj; hidden = residual_add "
        "of down and residual, no final norm; the target's lm_head"
    ),
    "eagle3": (
        "h = linear fc of the residual streams before target layers [2, n // 2, n - 3]; residual = "
        "h; qkv of [rms_norm(embedding(id), input_layernorm), rms_norm(h, hidden_norm)]; rotary, "
        "attention, o_proj, add_rms_norm, gate_up, silu_and_mul, down_proj, add_rms_norm; own "
        "lm_head of the normed row, hidden = its sum; target id = draft id + d2t"
    ),
    "drafting": (
        "first pass: position p has the target's row p and id p + 1, its keys and values replace a "
        "chain's; chain row j: id d_j, hidden of the row before, the base row's position + j; "
        "greedy"
    ),
    "verification": (
        "greedy; drafts are accepted up to the first that the target does not choose; then the "
        "target's own choice"
    ),
    "greedy": "highest value, lowest id; -0 equals +0; NaN is an error",
    "top_k": "value descending, then id ascending",
}

# What runs once a layer, in order; qk_norm only where the model has it.
_LAYER = (
    "input_layernorm",
    "qkv_proj",
    "qk_norm",
    "rotary",
    "attention",
    "o_proj",
    "attention_residual",
    "post_attention_layernorm",
    "gate_up_proj",
    "silu_and_mul",
    "down_proj",
    "mlp_residual",
)
MODEL_TYPES = ("context-lm", "llama", "qwen3")

# What runs once a row of a draft head, in order; the two norms of its inputs and the last one only
# in the kind "eagle3".
_DRAFT = (
    "embedding",
    "fc",
    "input_layernorm",
    "hidden_norm",
    "qkv_proj",
    "rotary",
    "attention",
    "o_proj",
    "attention_residual",
    "post_attention_layernorm",
    "gate_up_proj",
    "silu_and_mul",
    "down_proj",
    "hidden",
    "norm",
    "lm_head",
)
_EAGLE3_ONLY = ("input_layernorm", "hidden_norm", "norm")
DRAFT_KINDS = ("eagle", "eagle3")
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
            "polynomials": _POLYNOMIALS,
        }

    @property
    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON of `facts`."""
        text = json.dumps(self.facts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


# As hex floats, so that the digest covers every bit.
_POLYNOMIALS = {
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


def operations(model_type: str, layers: int = 0) -> tuple[str, ...]:
    """Return the names of the fingerprinted operations of a model type, in running order.

    layers: how many the model has; context-lm has none. Raises ValueError for an unknown type.
    """
    if model_type not in MODEL_TYPES:
        raise ValueError(f"unknown model type {model_type!r}: known are {', '.join(MODEL_TYPES)}")
    if model_type == "context-lm":
        return ("embedding", "lm_head")
    of_layer = [name for name in _LAYER if name != "qk_norm" or model_type == "qwen3"]
    named = [f"layers.{layer}.{name}" for layer in range(layers) for name in of_layer]
    return ("embedding", *named, "norm", "lm_head")


def draft_operations(kind: str) -> tuple[str, ...]:
    """Return the names of the fingerprinted operations of a draft head, in running order.

    kind: one of DRAFT_KINDS. Raises ValueError for an unknown one.
    """
    if kind not in DRAFT_KINDS:
        raise ValueError(f"unknown kind of head {kind!r}: known are {', '.join(DRAFT_KINDS)}")
    names = [name for name in _DRAFT if kind == "eagle3" or name not in _EAGLE3_ONLY]
    return tuple(f"draft.{name}" for name in names)
