"""One decoder layer: attention and feed-forward, each projection of several as one product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bitassay.engine.models.batch import Batch
from bitassay.engine.models.ops import Ops
from bitassay.reference.spec.contract import Contract

# Called with an operation's name and its rows, which nothing overwrites later.
Observe = Callable[[str, Tensor], None]


class LayerConfig(Protocol):
    """What a model's configuration says of a layer."""

    @property
    def num_heads(self) -> int:
        """How many heads query."""

    @property
    def num_kv_heads(self) -> int:
        """How many heads are queried."""

    @property
    def head_dim(self) -> int:
        """How many elements a head has."""

    @property
    def rms_norm_eps(self) -> float:
        """What is added to a mean square."""


@dataclass(frozen=True)
class Shared:
    """What all layers have in common; cos, sin: fp32 [positions, D / 2]."""

    config: LayerConfig
    contract: Contract
    ops: Ops
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class Projection:
    """A linear layer, or several over the same input packed into one: [N, K] and bias [N]."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def pack(cls, weights: Mapping[str, Tensor], *names: str) -> Projection:
        """Return the projections of these names, their outputs side by side."""
        biases = [weights[f"{name}.bias"] for name in names if f"{name}.bias" in weights]
        weight = torch.cat([weights[f"{name}.weight"] for name in names])
        return cls(weight, torch.cat(biases) if biases else None)


@dataclass(frozen=True)
class DecoderLayer:
    """The weights of one layer, on one device.

    input_layernorm: applied before `forward`, by whoever adds to the residual stream; a draft
    head may have none.
    """

    shared: Shared
    input_layernorm: Tensor | None
    qkv_proj: Projection
    q_norm: Tensor | None
    k_norm: Tensor | None
    o_proj: Projection
    post_attention_layernorm: Tensor
    gate_up_proj: Projection
    down_proj: Projection

    @classmethod
    def load(cls, shared: Shared, weights: Mapping[str, Tensor]) -> DecoderLayer:
        """Return a layer of tensors named as those below "model.layers.{i}." of a checkpoint."""
        attention, mlp = "self_attn.", "mlp."
        return cls(
            shared,
            weights.get("input_layernorm.weight"),
            Projection.pack(weights, *(f"{attention}{x}_proj" for x in "qkv")),
            weights.get(f"{attention}q_norm.weight"),
            weights.get(f"{attention}k_norm.weight"),
            Projection.pack(weights, f"{attention}o_proj"),
            weights["post_attention_layernorm.weight"],
            Projection.pack(weights, f"{mlp}gate_proj", f"{mlp}up_proj"),
            Projection.pack(weights, f"{mlp}down_proj"),
        )

    def forward(  # [T, H], [T, H] -> [T, H], [T, H]
        self, normed: Tensor, residual: Tensor, batch: Batch, index: int, observe: Observe
    ) -> tuple[Tensor, Tensor]:
        """Return what the layer adds to the residual stream at its end, and that stream until then.

        normed: the stream after this layer's input_layernorm; of a draft head, whatever its
        qkv_proj takes. index: the layer's number, for the
        cache. observe: called with the operations' names within the layer.
        """
        eps, run = self.shared.config.rms_norm_eps, self.shared.ops
        attended = self._attend(normed, batch, index, observe)
        update = self._project(attended, self.o_proj)
        observe("o_proj", update)
        normed, residual = run.add_rms_norm(
            update, residual, self.post_attention_layernorm, eps=eps
        )
        observe("attention_residual", residual)
        observe("post_attention_layernorm", normed)
        gate_up = self._project(normed, self.gate_up_proj)
        observe("gate_up_proj", gate_up)
        inner = run.silu_and_mul(gate_up)
        observe("silu_and_mul", inner)
        update = self._project(inner, self.down_proj)
        observe("down_proj", update)
        return update, residual

    def _attend(self, normed: Tensor, batch: Batch, index: int, observe: Observe) -> Tensor:
        config, run = self.shared.config, self.shared.ops
        heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        qkv = self._project(normed, self.qkv_proj)
        observe("qkv_proj", qkv)
        q, k, v = qkv.unflatten(1, (-1, config.head_dim)).split(heads, 1)
        # Never in place: what was observed may still be read, on another stream.
        if self.q_norm is not None and self.k_norm is not None:
            rows, (to_q, to_k) = self._queries_and_keys(qkv)
            q = run.rms_norm(q, self.q_norm, eps=config.rms_norm_eps, out=to_q)
            k = run.rms_norm(k, self.k_norm, eps=config.rms_norm_eps, out=to_k)
            observe("qk_norm", rows)
        rows, out = self._queries_and_keys(qkv)
        q, k = run.rotary(q, k, batch.positions, self.shared.cos, self.shared.sin, out=out)
        observe("rotary", rows)
        k_cache, v_cache = batch.cache.k[index], batch.cache.v[index]
        run.write_cache(k, v, k_cache, v_cache, batch.slots)
        attended = run.paged_attention(
            q, k_cache, v_cache, batch.block_tables, batch.query_start, batch.seq_lens,
            contract=self.shared.contract,
            max_query_len=batch.max_query_len, max_seq_len=batch.max_seq_len,
            # Rows of no sequence are left alone by attention, and must be numbers.
            out=q.new_zeros(q.shape) if batch.padded else None,
        ).flatten(1)  # fmt: skip
        observe("attention", attended)
        return attended

    def _queries_and_keys(self, qkv: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return memory for rows of all queries and keys, and views of each, [T, heads, D]."""
        config = self.shared.config
        heads = [config.num_heads, config.num_kv_heads]
        rows = qkv.new_empty(len(qkv), sum(heads) * config.head_dim)
        q, k = rows.unflatten(1, (-1, config.head_dim)).split(heads, 1)
        return rows, (q, k)

    def _project(self, x: Tensor, projection: Projection) -> Tensor:
        shared = self.shared
        return shared.ops.linear(x, projection.weight, projection.bias, contract=shared.contract)
