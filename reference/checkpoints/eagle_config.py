"""What config.json and tensors say of an EAGLE draft head, and its weights. Computes nothing.

Layouts: the heads that the authors of EAGLE (arXiv 2401.15077) and EAGLE-3 (arXiv 2503.01840) have
published on Hugging Face, for example EAGLE-LLaMA3.1-Instruct-8B and EAGLE3-LLaMA3.1-Instruct-8B.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bitassay.reference.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointError,
    config_int,
    require,
)
from bitassay.reference.checkpoints.model_config import ModelConfig
from bitassay.reference.spec.contract import DRAFT_KINDS, draft_operations
from bitassay.reference.spec.dtypes import has_role
from bitassay.reference.spec.rotary_table import Llama3Scaling, RotaryTable, rotary_table

# The kinds that a head of an architecture can be. Both kinds are published under the plain name,
# so tensors decide; a name of one kind must not contradict them.
ARCHITECTURES = {
    "LlamaForCausalLM": DRAFT_KINDS,
    "LlamaForCausalLMEagle": ("eagle",),
    "EagleLlamaForCausalLM": ("eagle",),
    "LlamaForCausalLMEagle3": ("eagle3",),
    "Eagle3LlamaForCausalLM": ("eagle3",),
}

# Options that change what is computed, and the only value of each that is computed here.
_ONLY: dict[str, Any] = {
    "add_para_norm": False,
    "eagle_config": None,
    "logit_scale": 1.0,
    "mlp_bias": False,
    "norm_before_fc": False,
    "norm_before_residual": False,
    "parallel_drafting": False,
}
_LAYERS = {"layers.0.": "layer.", "midlayer.": "layer."}


@dataclass(frozen=True)
class EagleConfig:
    """The sizes and options of one draft head, which has a single decoder layer.

    kind: "eagle" or "eagle3". vocab_size, max_position_embeddings, dtype: the target's; the head's
    own max_position_embeddings limits nothing, since positions are angles and no table is learned.
    draft_vocab_size: the width of the head's logits. own_embedding: whether it brings a table of
    its own. hidden_operations: the target's operations whose rows, side by side, it is fed.
    """

    kind: str
    vocab_size: int
    draft_vocab_size: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    theta: float
    scaling: Llama3Scaling | None
    max_position_embeddings: int
    attention_bias: bool
    fc_bias: bool
    own_embedding: bool
    hidden_operations: tuple[str, ...]
    dtype: torch.dtype
    num_layers: int = 1

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, target: ModelConfig) -> EagleConfig:
        """Read a head's config.json for the model whose tokens it drafts.

        Raises CheckpointError for another architecture, an option that is not supported, a head
        that does not fit the target, and sizes that do not fit together; each by name.
        """
        names = _canonical_names(checkpoint)
        kind = _kind(checkpoint, names)
        own = _as_llama(checkpoint, target)
        draft_vocab_size = target.vocab_size
        if kind == "eagle3":
            operations = _hidden_operations(checkpoint, target)
            if checkpoint.config.get("draft_vocab_size") is not None:
                draft_vocab_size = config_int(checkpoint, "draft_vocab_size")
        else:
            operations = ("norm",)
        return cls(
            kind=kind,
            vocab_size=target.vocab_size,
            draft_vocab_size=draft_vocab_size,
            hidden_size=own.hidden_size,
            num_heads=own.num_heads,
            num_kv_heads=own.num_kv_heads,
            head_dim=own.head_dim,
            intermediate_size=own.intermediate_size,
            rms_norm_eps=own.rms_norm_eps,
            theta=own.theta,
            scaling=own.scaling,
            max_position_embeddings=target.max_position_embeddings,
            attention_bias=own.attention_bias,
            fc_bias="fc.bias" in names,
            own_embedding="embed_tokens.weight" in names,
            hidden_operations=operations,
            dtype=target.dtype,
        )

    @property
    def operations(self) -> tuple[str, ...]:
        """The head's fingerprinted operations, in running order."""
        return draft_operations(self.kind)

    @property
    def rotary_table(self) -> RotaryTable:
        """The tables of cosines and sines for every position the target allows."""
        return rotary_table(self.theta, self.head_dim, self.max_position_embeddings, self.scaling)

    def weights(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """Return the head's tensors under canonical names, rounded to the target's dtype.

        "fc.weight", "layer.*" and what else `shapes` names; of the kind "eagle3" also "d2t", int64
        [draft_vocab_size]: target id = draft id + d2t[draft id]. Raises CheckpointError naming
        every tensor that is missing, superfluous or unfit.
        """
        names = _canonical_names(checkpoint)
        tensors = {own: checkpoint.tensors[name] for own, name in names.items()}
        tensors.pop("t2d", None)  # the inverse of d2t, of use in training alone
        d2t = tensors.pop("d2t", None)
        # Errors name tensors as the file does.
        shapes = {names.get(own, own): shape for own, shape in self.shapes().items()}
        rounded = {
            names[own]: self._rounded(checkpoint, names[own], x) for own, x in tensors.items()
        }
        found = require(replace(checkpoint, tensors=rounded), shapes, self.dtype)
        weights = {own: found[names[own]] for own in self.shapes()}
        if self.kind == "eagle3":
            weights["d2t"] = self._d2t(checkpoint, d2t)
        elif d2t is not None:
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: expected no d2t beside the tensors of an EAGLE-1 "
                "head, whose vocabulary is the target's, found one: export the weights again"
            )
        return weights

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every floating-point tensor by canonical name."""
        hidden, inner, third = self.hidden_size, self.intermediate_size, self.kind == "eagle3"
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        width = 2 * hidden if third else hidden  # of what the layer's attention reads
        shapes: dict[str, tuple[int, ...]] = {"fc.weight": (hidden, (3 if third else 2) * hidden)}
        if self.fc_bias:
            shapes["fc.bias"] = (hidden,)
        if self.own_embedding:
            shapes["embed_tokens.weight"] = (self.vocab_size, hidden)
        if third:
            shapes["layer.input_layernorm.weight"] = (hidden,)
            shapes["layer.hidden_norm.weight"] = (hidden,)
        attention = {"q": (q, width), "k": (kv, width), "v": (kv, width), "o": (hidden, q)}
        for name, shape in attention.items():
            shapes[f"layer.self_attn.{name}_proj.weight"] = shape
            if self.attention_bias:
                shapes[f"layer.self_attn.{name}_proj.bias"] = shape[:1]
        shapes["layer.post_attention_layernorm.weight"] = (hidden,)
        shapes["layer.mlp.gate_proj.weight"] = (inner, hidden)
        shapes["layer.mlp.up_proj.weight"] = (inner, hidden)
        shapes["layer.mlp.down_proj.weight"] = (hidden, inner)
        if third:
            shapes["norm.weight"] = (hidden,)
            shapes["lm_head.weight"] = (self.draft_vocab_size, hidden)
        return shapes

    def _rounded(self, checkpoint: Checkpoint, name: str, tensor: Tensor) -> Tensor:
        if not has_role(tensor.dtype, "weight"):
            return tensor  # refused with what else is unfit
        rounded = tensor.to(self.dtype)  # RN: once, from fp16 by way of fp32, which holds it
        if not rounded.isfinite().all():
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: expected weights within {self.dtype}, the "
                f"target's type, found {float(tensor.abs().max())} in {name}: name a target of "
                "another type"
            )
        return rounded

    def _d2t(self, checkpoint: Checkpoint, d2t: Tensor | None) -> Tensor:
        if d2t is None and self.draft_vocab_size == self.vocab_size:
            return torch.zeros(self.vocab_size, dtype=torch.int64)
        where, size = f"checkpoint {checkpoint.path}", self.draft_vocab_size
        if d2t is None or d2t.dtype != torch.int64 or d2t.shape != (size,):
            found = "none" if d2t is None else f"{d2t.dtype} {list(d2t.shape)}"
            raise CheckpointError(
                f"{where}: expected d2t of torch.int64 [{size}] (draft_vocab_size), found {found}: "
                "correct config.json, or export the weights again"
            )
        ids = torch.arange(size) + d2t
        # Ascending: then the lowest draft id of equal logits is the lowest target id as well.
        if not (ids.diff() > 0).all() or int(ids[0]) < 0 or int(ids[-1]) >= self.vocab_size:
            raise CheckpointError(
                f"{where}: expected every draft id + d2t to be an id within 0 … "
                f"{self.vocab_size - 1} (the target's vocabulary), ascending, found "
                f"{int(ids.min())} … {int(ids.max())}: the head was made for another model, or "
                "export the weights again"
            )
        return d2t


def _canonical_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Return canonical name -> the name in the file, of every tensor."""
    names: dict[str, str] = {}
    for name in checkpoint.tensors:
        own = name.removeprefix("model.")
        for prefix, layer in _LAYERS.items():
            if own.startswith(prefix):
                own = layer + own.removeprefix(prefix)
        if own in names:
            raise CheckpointError(
                f"checkpoint {checkpoint.path}: expected one tensor for {own}, found {names[own]} "
                f"and {name}: export the weights again"
            )
        names[own] = name
    return names


def _kind(checkpoint: Checkpoint, names: dict[str, str]) -> str:
    kind = "eagle3" if "layer.hidden_norm.weight" in names else "eagle"
    named = checkpoint.config.get("architectures") or ["LlamaForCausalLM"]
    known = isinstance(named, list) and len(named) == 1 and isinstance(named[0], str)
    kinds = ARCHITECTURES.get(named[0], ()) if known else ()
    if kind not in kinds or checkpoint.config.get("model_type") != "llama":
        wanted = ", ".join(name for name, kinds in ARCHITECTURES.items() if kind in kinds)
        raise _unfit(
            checkpoint,
            f"model_type 'llama' and one of {wanted} (a head with the tensors of {kind!r})",
            f"{checkpoint.config.get('model_type')!r}, {named!r}",
        )
    if "fc.weight" not in names:
        raise CheckpointError(
            f"checkpoint {checkpoint.path}: expected a draft head, which has fc.weight, found "
            f"{len(names)} tensors without it: name the directory of an EAGLE or EAGLE-3 head"
        )
    return kind


def _as_llama(checkpoint: Checkpoint, target: ModelConfig) -> ModelConfig:
    """Read the layer's sizes as those of a Llama, once they fit the target."""
    for key, only in _ONLY.items():
        if checkpoint.config.get(key, only) != only:
            found = repr(checkpoint.config[key])
            raise _unfit(checkpoint, f"{key} {only!r}, the one supported", found)
    dtype = str(target.dtype).removeprefix("torch.")  # whatever the head was stored in
    as_llama = checkpoint.config | {"architectures": None, "torch_dtype": dtype}
    own = ModelConfig.from_checkpoint(replace(checkpoint, config=as_llama))
    if own.num_layers != 1:
        raise _unfit(checkpoint, "num_hidden_layers 1, as a draft head has", str(own.num_layers))
    pairs = {
        "hidden_size": (own.hidden_size, target.hidden_size),
        "vocab_size": (own.vocab_size, target.vocab_size),
        "target_hidden_size": (
            checkpoint.config.get("target_hidden_size") or target.hidden_size,
            target.hidden_size,
        ),
    }
    for key, (mine, wanted) in pairs.items():
        if mine != wanted:
            raise _unfit(checkpoint, f"{key} {wanted}, as the target has", repr(mine))
    return own


def _hidden_operations(checkpoint: Checkpoint, target: ModelConfig) -> tuple[str, ...]:
    """Name the residual streams before three layers: the third, the middle, the third last."""
    layers = target.num_layers
    if layers < 3:
        raise _unfit(checkpoint, "a target of at least 3 layers for an EAGLE-3 head", str(layers))
    # What enters layer i is the embedding, or what layer i - 1 left in the residual stream.
    return tuple(
        f"layers.{i - 1}.mlp_residual" if i else "embedding" for i in (2, layers // 2, layers - 3)
    )


def _unfit(checkpoint: Checkpoint, expected: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.path / 'config.json'}: expected {expected}; found {found}: name another head"
    )
