"""One decoder layer: attention and feed-forward, each projection of several as one product."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import cache, rotary
from ..kernels.activation import silu_and_mul
from ..kernels.attention import paged_attention
from ..kernels.linear import linear
from ..kernels.norm import add_rms_norm, rms_norm
from ..reference.config import ModelConfig
from ..reference.contract import Contract
from .batch import Batch

# Called with an operation's name and its rows. Some are overwritten later: clone what is kept.
Observe = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Shared:
    """What all layers have in common; cos, sin: fp32 [positions, D / 2]."""

    config: ModelConfig
    contract: Contract
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
class Layer:
    """The weights of one layer, on one device."""

    shared: Shared
    input_layernorm: Tensor
    qkv_proj: Projection
    q_norm: Tensor | None
    k_norm: Tensor | None
    o_proj: Projection
    post_attention_layernorm: Tensor
    gate_up_proj: Projection
    down_proj: Projection

    @classmethod
    def load(cls, shared: Shared, weights: Mapping[str, Tensor]) -> Layer:
        """Return a layer of the tensors below "model.layers.{i}." of a checkpoint."""
        attention, mlp = "self_attn.", "mlp."
        return cls(
            shared,
            weights["input_layernorm.weight"],
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

        normed: the stream after this layer's input_layernorm. index: the layer's number, for the
        cache. observe: called with the operations' names within the layer.
        """
        eps = self.shared.config.rms_norm_eps
        attended = self._attend(normed, batch, index, observe)
        update = self._project(attended, self.o_proj)
        observe("o_proj", update)
        normed, residual = add_rms_norm(update, residual, self.post_attention_layernorm, eps=eps)
        observe("attention_residual", residual)
        observe("post_attention_layernorm", normed)
        gate_up = self._project(normed, self.gate_up_proj)
        observe("gate_up_proj", gate_up)
        inner = silu_and_mul(gate_up)
        observe("silu_and_mul", inner)
        update = self._project(inner, self.down_proj)
        observe("down_proj", update)
        return update, residual

    def _attend(self, normed: Tensor, batch: Batch, index: int, observe: Observe) -> Tensor:
        config = self.shared.config
        heads, kv_heads = config.num_heads, config.num_kv_heads
        qkv = self._project(normed, self.qkv_proj)
        observe("qkv_proj", qkv)
        turned = qkv[:, : (heads + kv_heads) * config.head_dim]  # q and k, changed in place
        q, k, v = qkv.unflatten(1, (-1, config.head_dim)).split([heads, kv_heads, kv_heads], 1)
        if self.q_norm is not None and self.k_norm is not None:
            rms_norm(q, self.q_norm, eps=config.rms_norm_eps, out=q)
            rms_norm(k, self.k_norm, eps=config.rms_norm_eps, out=k)
            observe("qk_norm", turned)
        rotary.apply(q, k, batch.positions, self.shared.cos, self.shared.sin, out=(q, k))
        observe("rotary", turned)
        k_cache, v_cache = batch.cache.k[index], batch.cache.v[index]
        cache.write(k, v, k_cache, v_cache, batch.slots)
        attended = paged_attention(
            q, k_cache, v_cache, batch.block_tables, batch.query_start, batch.seq_lens,
            contract=self.shared.contract,
            max_query_len=batch.max_query_len, max_seq_len=batch.max_seq_len,
        ).flatten(1)  # fmt: skip
        observe("attention", attended)
        return attended

    def _project(self, x: Tensor, projection: Projection) -> Tensor:
        return linear(x, projection.weight, projection.bias, contract=self.shared.contract)
