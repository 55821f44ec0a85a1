"""Which fingerprinted operations a model or a draft head runs, in order: their names."""

from __future__ import annotations

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
