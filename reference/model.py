"""Llama and Qwen3, whole: the sequential truth that engines are compared with.

Rows of several sequences go through the linear layers together and through attention one sequence
at a time; no row ever depends on another sequence, nor on how its own was fed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from bitassay.reference.attention import attention
from bitassay.reference.checkpoints.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from bitassay.reference.checkpoints.model_config import ModelConfig
from bitassay.reference.decoder_layer import Attend, DecoderLayer, readiness
from bitassay.reference.decoding import Ids, check_sequence
from bitassay.reference.embedding import embedding
from bitassay.reference.generation import Generator, KVCache, Observe
from bitassay.reference.linear import lm_head
from bitassay.reference.norm import add_rms_norm, rms_norm
from bitassay.reference.spec.contract import Contract, operations

__all__ = ["CausalLM", "KVCache", "LlamaForCausalLM", "Qwen3ForCausalLM", "load_model"]


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
        ready = readiness(weights, contract)
        self.embed_tokens = weights["model.embed_tokens.weight"]
        prefixes = [f"model.layers.{i}." for i in range(self.config.num_layers)]
        self._layers = [
            DecoderLayer.of(weights, prefix, self.config, contract, ready) for prefix in prefixes
        ]
        self._norms = [weights[f"{prefix}input_layernorm.weight"] for prefix in prefixes]
        self._norms.append(weights["model.norm.weight"])
        self._lm_head = ready(weights["lm_head.weight"])

    @classmethod
    def from_pretrained(cls, path: str | Path | Checkpoint, *, contract: Contract) -> CausalLM:
        """Load from a model directory or a checkpoint already read; CheckpointError if unfit."""
        return cls(path if isinstance(path, Checkpoint) else load_checkpoint(path), contract)

    def hidden(  # [T] -> [T, H]
        self, token_ids: Ids, cache: KVCache | None = None, observe: Observe | None = None
    ) -> Tensor:
        """Return the rows after the final norm.

        token_ids: the positions after those in the cache, which is extended; without a cache, the
        sequence from its start. observe: see `Observe`. Raises SequenceError for ids outside the
        vocabulary and ValueError for positions beyond max_position_embeddings.
        """
        ids = check_sequence(token_ids, self.vocab_size)
        return self.forward([ids], [KVCache() if cache is None else cache], observe)

    def logits(self, hidden: Tensor) -> Tensor:  # [T, H] -> [T, V]
        """Return the logits of hidden rows, in the dtype the contract names."""
        return lm_head(hidden, self._lm_head, contract=self.contract)

    def forward(
        self, fed: list[Tensor], caches: list[KVCache], observe: Observe | None = None
    ) -> Tensor:  # -> [R, H]
        """Feed each sequence its next ids, extending its cache; return rows after the norm."""
        note = observe or (lambda name, rows: None)
        eps, lengths = self.config.rms_norm_eps, [len(ids) for ids in fed]
        ranges = [
            torch.arange(cache.length, cache.length + length)
            for cache, length in zip(caches, lengths, strict=True)
        ]
        positions = torch.cat(ranges)
        residual = embedding(torch.cat(fed), self.embed_tokens)
        note("embedding", residual)
        normed = rms_norm(residual, self._norms[0], eps=eps)
        for i, layer in enumerate(self._layers):
            name = f"layers.{i}."
            note(name + "input_layernorm", normed)
            x, residual = layer(
                normed,
                residual,
                positions,
                attend_each(caches, i, lengths, self.contract),
                _prefixed(name, note),
            )
            normed, residual = add_rms_norm(x, residual, self._norms[i + 1], eps=eps)
            note(name + "mlp_residual", residual)
        note("norm", normed)
        return normed


def attend_each(
    caches: list[KVCache], layer: int, lengths: list[int], contract: Contract
) -> Attend:
    """Return causal attention of each sequence's new rows to its cache, which they extend."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = zip(q.split(lengths), k.split(lengths), v.split(lengths), caches, strict=True)
        parts = [
            attention(own_q, *cache.extend(layer, own_k, own_v), contract=contract)
            for own_q, own_k, own_v, cache in rows
        ]
        return torch.cat(parts)

    return attend


def _prefixed(prefix: str, note: Observe) -> Observe:
    return lambda name, rows: note(prefix + name, rows)


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
