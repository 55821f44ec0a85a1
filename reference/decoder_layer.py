"""What a decoder layer computes between the norm of its input and the end of its MLP.

Rows of several sequences go through the linear layers together; attention is the caller's, who
knows which keys a row may see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitassay.reference import rotary
from bitassay.reference.activation import silu_and_mul
from bitassay.reference.checkpoints.eagle_config import EagleConfig
from bitassay.reference.checkpoints.model_config import ModelConfig
from bitassay.reference.linear import Weight, linear, prepare
from bitassay.reference.norm import add_rms_norm, rms_norm
from bitassay.reference.spec.contract import Contract

Note = Callable[[str, Tensor], None]  # called with an operation's name and its rows
# Queries [R, Hq, D], keys and values [R, Hkv, D] of new rows -> what they attend to, [R, Hq, D].
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Ready = Callable[[Tensor], Weight]

# A prepared weight takes three times the memory and pays off where rows are few.
PREPARED_ELEMENTS = 1 << 27


@dataclass(frozen=True)
class Linear:
    """A linear layer under one contract."""

    weight: Weight
    bias: Tensor | None
    contract: Contract

    def __call__(self, x: Tensor) -> Tensor:  # [T, K] -> [T, N]
        """Return `linear` of the rows."""
        return linear(x, self.weight, self.bias, contract=self.contract)


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer's weights; q, k, v and gate, up are packed, which changes no bit."""

    config: ModelConfig | EagleConfig
    qkv_proj: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o_proj: Linear
    post_attention_layernorm: Tensor
    gate_up_proj: Linear
    down_proj: Linear

    @classmethod
    def of(
        cls,
        weights: dict[str, Tensor],
        prefix: str,
        config: ModelConfig | EagleConfig,
        contract: Contract,
        ready: Ready,
    ) -> DecoderLayer:
        """Take a layer's own from weights named "<prefix>self_attn.q_proj.weight" and so on."""

        def packed(*names: str) -> Linear:
            biases = [
                weights[f"{prefix}{name}.bias"]
                for name in names
                if f"{prefix}{name}.bias" in weights
            ]
            weight = torch.cat([weights[f"{prefix}{name}.weight"] for name in names])
            return Linear(ready(weight), torch.cat(biases) if biases else None, contract)

        return cls(
            config,
            packed("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            weights.get(f"{prefix}self_attn.q_norm.weight"),
            weights.get(f"{prefix}self_attn.k_norm.weight"),
            packed("self_attn.o_proj"),
            weights[f"{prefix}post_attention_layernorm.weight"],
            packed("mlp.gate_proj", "mlp.up_proj"),
            packed("mlp.down_proj"),
        )

    def __call__(  # [R, K], [R, H], [R] -> [R, H], [R, H]
        self, x: Tensor, residual: Tensor, positions: Tensor, attend: Attend, note: Note
    ) -> tuple[Tensor, Tensor]:
        """Return what the MLP adds to the residual stream, and that stream before it does.

        x: the rows that qkv_proj reads. note: sees every operation's rows under its bare name.
        """
        x = attend(*self._qkv(x, positions, note))
        note("attention", x)
        x = self.o_proj(x.flatten(1))
        note("o_proj", x)
        weight = self.post_attention_layernorm
        x, residual = add_rms_norm(x, residual, weight, eps=self.config.rms_norm_eps)
        note("attention_residual", residual)
        note("post_attention_layernorm", x)
        x = self.gate_up_proj(x)
        note("gate_up_proj", x)
        x = silu_and_mul(x)
        note("silu_and_mul", x)
        x = self.down_proj(x)
        note("down_proj", x)
        return x, residual

    def _qkv(self, x: Tensor, positions: Tensor, note: Note) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries [R, Hq, D], keys and values [R, Hkv, D], turned to their positions."""
        config = self.config
        packed = self.qkv_proj(x)
        note("qkv_proj", packed)
        heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        q, k, v = packed.view(len(packed), -1, config.head_dim).split(heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q = rms_norm(q, self.q_norm, eps=config.rms_norm_eps)
            k = rms_norm(k, self.k_norm, eps=config.rms_norm_eps)
            note("qk_norm", torch.cat([q, k], dim=1))
        table = config.rotary_table
        q, k = rotary.apply(q, k, positions, table.cos, table.sin)
        note("rotary", torch.cat([q, k], dim=1))
        return q, k, v


def readiness(weights: dict[str, Tensor], contract: Contract) -> Ready:
    """Return what makes a weight ready for use: prepared where all of them are few enough."""
    if sum(weight.numel() for weight in weights.values()) > PREPARED_ELEMENTS:
        return lambda weight: weight
    return lambda weight: prepare(weight, contract)
