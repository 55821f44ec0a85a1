"""Llama and Qwen3, whole: the sequential truth that engines are compared with.

Rows of several sequences go through the linear layers together and through attention one sequence
at a time; no row ever depends on another sequence, nor on how its own was fed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import rotary
from .activation import silu_and_mul
from .attention import attention
from .checkpoint import Checkpoint, CheckpointError, load_checkpoint
from .config import ModelConfig
from .contract import Contract, operations
from .decoding import Ids, check_ids
from .embedding import embedding
from .generation import Generator, KVCache, Observe
from .linear import Weight, linear, lm_head, prepare
from .norm import add_rms_norm, rms_norm

__all__ = ["CausalLM", "KVCache", "LlamaForCausalLM", "Qwen3ForCausalLM", "load_model"]

# A prepared weight takes three times the memory and pays off where rows are few.
_PREPARED_ELEMENTS = 1 << 27


@dataclass(frozen=True)
class _Linear:
    weight: Weight
    bias: Tensor | None

    def __call__(self, x: Tensor, contract: Contract) -> Tensor:
        return linear(x, self.weight, self.bias, contract=contract)


@dataclass(frozen=True)
class _Layer:
    """One decoder layer's weights; q, k, v and gate, up are packed, which changes no bit."""

    input_layernorm: Tensor
    qkv_proj: _Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o_proj: _Linear
    post_attention_layernorm: Tensor
    gate_up_proj: _Linear
    down_proj: _Linear


class CausalLM(Generator):
    """A loaded decoder under one contract; `LlamaForCausalLM` and `Qwen3ForCausalLM` are its two.

    Raises CheckpointError for a checkpoint of another architecture or with unfit weights.
    """

    model_type: str

    def __init__(self, checkpoint: Checkpoint, contract: Contract) -> None:
        self.config = ModelConfig.from_checkpoint(checkpoint)
        if self.config.model_type != self.model_type:
            raise CheckpointError(
                f"{checkpoint.path / 'config.json'}: expected model_type {self.model_type!r}, "
                f"found {self.config.model_type!r}: name another checkpoint, or use load_model"
            )
        self.contract = contract
        super().__init__(
            operations(self.model_type, self.config.num_layers),
            self.config.vocab_size,
            self.config.max_position_embeddings,
        )
        weights = self.config.weights(checkpoint)
        self._prepared = sum(w.numel() for w in weights.values()) <= _PREPARED_ELEMENTS
        self._embed_tokens = weights["model.embed_tokens.weight"]
        self._layers = [self._layer(weights, i) for i in range(self.config.num_layers)]
        self._norm = weights["model.norm.weight"]
        self._lm_head = self._ready(weights["lm_head.weight"])

    @classmethod
    def from_pretrained(cls, path: str | Path | Checkpoint, *, contract: Contract) -> CausalLM:
        """Load from a model directory or a checkpoint already read; CheckpointError if unfit."""
        return cls(path if isinstance(path, Checkpoint) else load_checkpoint(path), contract)

    def hidden(  # [T] -> [T, H]
        self, token_ids: Ids, cache: KVCache | None = None, observe: Observe | None = None
    ) -> Tensor:
        """Return the rows after the final norm.

        token_ids: the positions after those in the cache, which is extended; without a cache, the
        sequence from its start. observe: see `Observe`. Raises ValueError for ids outside the
        vocabulary and for positions beyond max_position_embeddings.
        """
        (ids,) = check_ids([token_ids], self.vocab_size, "sequence")
        return self.forward([ids], [KVCache() if cache is None else cache], observe)

    def logits(self, hidden: Tensor) -> Tensor:  # [T, H] -> [T, V]
        """Return the logits of hidden rows, in the dtype the contract names."""
        return lm_head(hidden, self._lm_head, contract=self.contract)

    def forward(
        self, fed: list[Tensor], caches: list[KVCache], observe: Observe | None = None
    ) -> Tensor:  # -> [R, H]
        """Feed each sequence its next ids, extending its cache; return rows after the norm."""
        note = observe or (lambda name, rows: None)
        eps, contract = self.config.rms_norm_eps, self.contract
        ranges = [
            torch.arange(cache.length, cache.length + len(ids))
            for ids, cache in zip(fed, caches, strict=True)
        ]
        positions = torch.cat(ranges)
        residual = embedding(torch.cat(fed), self._embed_tokens)
        note("embedding", residual)
        normed = rms_norm(residual, self._layers[0].input_layernorm, eps=eps)
        next_norms = [*(layer.input_layernorm for layer in self._layers[1:]), self._norm]
        for i, (layer, next_norm) in enumerate(zip(self._layers, next_norms, strict=True)):
            name = f"layers.{i}."
            note(name + "input_layernorm", normed)
            q, k, v = self._qkv(layer, normed, positions, name, note)
            x = self._attention(i, q, k, v, caches, [len(ids) for ids in fed])
            note(name + "attention", x)
            x = layer.o_proj(x.flatten(1), contract)
            note(name + "o_proj", x)
            weight = layer.post_attention_layernorm
            normed, residual = add_rms_norm(x, residual, weight, eps=eps)
            note(name + "attention_residual", residual)
            note(name + "post_attention_layernorm", normed)
            x = layer.gate_up_proj(normed, contract)
            note(name + "gate_up_proj", x)
            x = silu_and_mul(x)
            note(name + "silu_and_mul", x)
            x = layer.down_proj(x, contract)
            note(name + "down_proj", x)
            normed, residual = add_rms_norm(x, residual, next_norm, eps=eps)
            note(name + "mlp_residual", residual)
        note("norm", normed)
        return normed

    def _qkv(
        self, layer: _Layer, normed: Tensor, positions: Tensor, name: str, note: Observe
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [R, Hq, D], keys and values [R, Hkv, D], turned to their positions."""
        config = self.config
        packed = layer.qkv_proj(normed, self.contract)
        note(name + "qkv_proj", packed)
        heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        q, k, v = packed.view(len(packed), -1, config.head_dim).split(heads, dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(q, layer.q_norm, eps=config.rms_norm_eps)
            k = rms_norm(k, layer.k_norm, eps=config.rms_norm_eps)
            note(name + "qk_norm", torch.cat([q, k], dim=1))
        table = config.rotary_table
        q, k = rotary.apply(q, k, positions, table.cos, table.sin)
        note(name + "rotary", torch.cat([q, k], dim=1))
        return q, k, v

    def _attention(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, caches: list[KVCache], lengths: list[int]
    ) -> Tensor:
        rows = zip(q.split(lengths), k.split(lengths), v.split(lengths), caches, strict=True)
        parts = [
            attention(own_q, *cache.extend(layer, own_k, own_v), contract=self.contract)
            for own_q, own_k, own_v, cache in rows
        ]
        return torch.cat(parts)

    def _layer(self, weights: dict[str, Tensor], index: int) -> _Layer:
        own = {
            name.removeprefix(f"model.layers.{index}."): weight
            for name, weight in weights.items()
            if name.startswith(f"model.layers.{index}.")
        }

        def packed(*names: str) -> _Linear:
            biases = [own[f"{name}.bias"] for name in names if f"{name}.bias" in own]
            weight = torch.cat([own[f"{name}.weight"] for name in names])
            return _Linear(self._ready(weight), torch.cat(biases) if biases else None)

        return _Layer(
            own["input_layernorm.weight"],
            packed("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            own.get("self_attn.q_norm.weight"),
            own.get("self_attn.k_norm.weight"),
            packed("self_attn.o_proj"),
            own["post_attention_layernorm.weight"],
            packed("mlp.gate_proj", "mlp.up_proj"),
            packed("mlp.down_proj"),
        )

    def _ready(self, weight: Tensor) -> Weight:
        return prepare(weight, self.contract) if self._prepared else weight


class LlamaForCausalLM(CausalLM):
    """Llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU."""

    model_type = "llama"


class Qwen3ForCausalLM(CausalLM):
    """Qwen3: Llama with a norm over each query and key head."""

    model_type = "qwen3"


def load_model(path: str | Path | Checkpoint, *, contract: Contract) -> CausalLM:
    """Load whichever of the two a model directory holds; CheckpointError for any other."""
    checkpoint = path if isinstance(path, Checkpoint) else load_checkpoint(path)
    model_type = ModelConfig.from_checkpoint(checkpoint).model_type
    models = {model.model_type: model for model in (LlamaForCausalLM, Qwen3ForCausalLM)}
    return models[model_type](checkpoint, contract)
