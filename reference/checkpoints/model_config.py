"""What config.json says of a Llama or Qwen3, and the weights it asks for. Reads; computes nothing.

Key names: https://huggingface.co/docs/transformers/model_doc/llama and …/qwen3.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitassay.reference.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    config_dtype,
    config_int,
    require,
)
from bitassay.reference.spec.dtypes import has_role, listed
from bitassay.reference.spec.rotary_table import (
    MOST_POSITIONS,
    Llama3Scaling,
    RotaryTable,
    rotary_table,
)

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_HEAD_SIZES = (64, 128)

# Options that change what is computed, and the only value of each that is computed here.
_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "use_sliding_window": False,
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "no_rope_layers": None,
}

_ROPE_KEYS = {
    "factor",
    "high_freq_factor",
    "low_freq_factor",
    "original_max_position_embeddings",
    "rope_theta",
    "rope_type",
    "type",
}


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and options of one decoder; rms_norm_eps and theta as config.json has them."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    theta: float
    scaling: Llama3Scaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    dtype: torch.dtype

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> ModelConfig:
        """Read a checkpoint's config.json.

        Raises CheckpointError for another architecture, an option that is not supported, and
        sizes that do not fit together; each by name.
        """
        model_type = _model_type(checkpoint)
        _refuse_options(checkpoint)
        theta, scaling = _rope(checkpoint)
        heads = config_int(checkpoint, "num_attention_heads")
        hidden = config_int(checkpoint, "hidden_size")
        config = cls(
            model_type=model_type,
            vocab_size=config_int(checkpoint, "vocab_size", minimum=8),
            hidden_size=hidden,
            num_layers=config_int(checkpoint, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=_int_or(checkpoint, "num_key_value_heads", heads),
            head_dim=_int_or(checkpoint, "head_dim", hidden // heads),
            intermediate_size=config_int(checkpoint, "intermediate_size"),
            rms_norm_eps=_number(checkpoint, checkpoint.config, "rms_norm_eps", 1e-6),
            theta=theta,
            scaling=scaling,
            max_position_embeddings=config_int(checkpoint, "max_position_embeddings"),
            tie_word_embeddings=_flag(checkpoint, "tie_word_embeddings"),
            attention_bias=_flag(checkpoint, "attention_bias"),
            mlp_bias=_flag(checkpoint, "mlp_bias"),
            dtype=config_dtype(checkpoint),
        )
        _check(checkpoint, config)
        return config

    @property
    def rotary_table(self) -> RotaryTable:
        """The tables of cosines and sines for every position the model allows."""
        return rotary_table(self.theta, self.head_dim, self.max_position_embeddings, self.scaling)

    def weights(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Return the model's tensors by name, `lm_head.weight` also where it is tied.

        Raises CheckpointError naming every tensor that is missing, superfluous or unfit.
        """
        shapes = self._shapes()
        tensors = checkpoint.tensors
        if self.tie_word_embeddings and "lm_head.weight" in tensors:
            # Some exporters write the tied table twice. Two tables that differ are not tied.
            table = tensors.get("model.embed_tokens.weight")
            if table is None or not torch.equal(tensors["lm_head.weight"], table):
                raise CheckpointError(
                    f"checkpoint {checkpoint.path}: expected lm_head.weight to be the embedding "
                    "table, as config.json's tie_word_embeddings says, found another: correct "
                    "config.json, or export the weights again"
                )
            shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
        weights = require(checkpoint, shapes, self.dtype)
        weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
        return weights

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocab_size, hidden),
            "model.norm.weight": (hidden,),
        }
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        linears = {
            "self_attn.q_proj": ((q, hidden), self.attention_bias),
            "self_attn.k_proj": ((kv, hidden), self.attention_bias),
            "self_attn.v_proj": ((kv, hidden), self.attention_bias),
            "self_attn.o_proj": ((hidden, q), self.attention_bias),
            "mlp.gate_proj": ((inner, hidden), self.mlp_bias),
            "mlp.up_proj": ((inner, hidden), self.mlp_bias),
            "mlp.down_proj": ((hidden, inner), self.mlp_bias),
        }
        norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        if self.model_type == "qwen3":
            norms |= {"self_attn.q_norm": self.head_dim, "self_attn.k_norm": self.head_dim}
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}."
            for name, (shape, bias) in linears.items():
                shapes[f"{prefix}{name}.weight"] = shape
                if bias:
                    shapes[f"{prefix}{name}.bias"] = shape[:1]
            shapes |= {f"{prefix}{name}.weight": (size,) for name, size in norms.items()}
        return shapes


def _model_type(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    model_type, named = config.get("model_type"), config.get("architectures")
    wanted = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if wanted is None or named not in (None, [wanted]):
        known = ", ".join(f"{a} ({m})" for m, a in ARCHITECTURES.items())
        raise _unfit(checkpoint, f"one of {known}", f"model_type {model_type!r}, {named!r}")
    return str(model_type)


def _refuse_options(checkpoint: Checkpoint) -> None:
    for key, only in _ONLY.items():
        # sliding_window is only a number on the shelf where use_sliding_window is off.
        if key == "sliding_window" and checkpoint.config.get("use_sliding_window") is False:
            continue
        value = checkpoint.config.get(key, only)
        if value != only:
            raise _unfit(checkpoint, f"{key} {only!r}, the one supported", repr(value))
    kinds = checkpoint.config.get("layer_types") or ["full_attention"]
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise _unfit(checkpoint, "layer_types of full_attention alone", repr(kinds))


def _rope(checkpoint: Checkpoint) -> tuple[float, Llama3Scaling | None]:
    """Return theta and scaling; newer configurations keep both in rope_parameters."""
    config = checkpoint.config
    newer, older = config.get("rope_parameters"), config.get("rope_scaling")
    if newer and older and newer != older:
        raise _unfit(
            checkpoint, "either rope_parameters or rope_scaling", f"both: {newer!r} and {older!r}"
        )
    parameters = newer or older or {}
    if not isinstance(parameters, dict):
        raise _unfit(checkpoint, "rope_scaling as an object or null", repr(parameters))
    if unknown := parameters.keys() - _ROPE_KEYS:
        raise _unfit(
            checkpoint, f"rope parameters among {', '.join(sorted(_ROPE_KEYS))}", repr(unknown)
        )
    where = parameters if "rope_theta" in parameters else config
    theta = _number(checkpoint, where, "rope_theta", 10000.0)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise _unfit(checkpoint, "rope_type 'default' or 'llama3'", repr(kind))
    factor, low, high = (
        _number(checkpoint, parameters, key, None)
        for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    original = parameters.get("original_max_position_embeddings")
    if type(original) is not int or original < 1 or high <= low:
        raise _unfit(
            checkpoint,
            "original_max_position_embeddings as an integer and high_freq_factor above "
            "low_freq_factor",
            f"{original!r}, {high} and {low}",
        )
    return theta, Llama3Scaling(factor, low, high, original)


def _check(checkpoint: Checkpoint, config: ModelConfig) -> None:
    if config.num_layers > len(checkpoint.tensors):  # before that many names are made
        raise _unfit(
            checkpoint,
            "num_hidden_layers to be no more than there are tensors",
            f"{config.num_layers} layers, {len(checkpoint.tensors)} tensors",
        )
    if config.head_dim not in _HEAD_SIZES:
        raise _unfit(checkpoint, "head_dim 64 or 128", str(config.head_dim))
    if config.num_heads % config.num_kv_heads:
        raise _unfit(
            checkpoint,
            "num_attention_heads to be a multiple of num_key_value_heads",
            f"{config.num_heads} and {config.num_kv_heads}",
        )
    if config.max_position_embeddings > MOST_POSITIONS:
        raise _unfit(
            checkpoint,
            f"max_position_embeddings of at most {MOST_POSITIONS} (beyond, fp32 cannot count)",
            str(config.max_position_embeddings),
        )
    if not has_role(config.dtype, "transformer"):
        found = str(config.dtype).removeprefix("torch.")
        raise _unfit(checkpoint, f"torch_dtype {listed('transformer')}", found)


def _int_or(checkpoint: Checkpoint, key: str, default: int) -> int:
    missing = checkpoint.config.get(key) is None
    return default if missing else config_int(checkpoint, key)


def _flag(checkpoint: Checkpoint, key: str) -> bool:
    value = checkpoint.config.get(key, False)
    if not isinstance(value, bool):
        raise _unfit(checkpoint, f"{key} to be true or false", repr(value))
    return value


def _number(
    checkpoint: Checkpoint, where: dict[str, Any], key: str, default: float | None
) -> float:
    value: Any = where.get(key, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= sys.float_info.max:
        raise _unfit(checkpoint, f"{key} to be a positive number", repr(value))
    return float(value)


def _unfit(checkpoint: Checkpoint, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path / 'config.json'}: expected {expected}; found {found}: name another "
        "checkpoint"
    )
