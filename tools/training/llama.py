"""A Llama in plain PyTorch, in the form that trains well: fp32 weights, dropout, SDPA.

Names and layout are those of Hugging Face's LlamaForCausalLM, so its weights load there unchanged.
It learns weights and chooses prompts; the bits that count come from the reference.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Cache = list[tuple[Tensor, Tensor]]  # for each layer keys and values, [B, KV, S, D] each
INITIAL_STD = 0.02


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of config.json; the defaults are llama-pico's."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 704
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_factor: float = 4.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 512

    def to_json(self) -> dict[str, Any]:
        """Return config.json as transformers reads it."""
        sizes = dataclasses.asdict(self)
        scaling = {
            "rope_type": "llama3",
            "factor": sizes.pop("rope_factor"),
            "low_freq_factor": sizes.pop("rope_low_freq_factor"),
            "high_freq_factor": sizes.pop("rope_high_freq_factor"),
            "original_max_position_embeddings": sizes.pop("original_max_position_embeddings"),
        }
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **sizes,
            "rope_scaling": scaling,
            "hidden_act": "silu",
            "initializer_range": INITIAL_STD,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": None,
            "eos_token_id": 0,
            "pad_token_id": 0,
        }


def inverse_frequencies(config: LlamaConfig) -> Tensor:  # -> [D/2] float64
    """Return the rotary frequencies in radians a position, scaled as Llama 3.1 scales them.

    Waves shorter than original / high_freq_factor positions stay, those longer than
    original / low_freq_factor turn `factor` times slower, those between are blended.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    plain = config.rope_theta**-exponents
    turns = config.original_max_position_embeddings * plain / (2 * math.pi)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (kept + (1 - kept) / config.rope_factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [B, H, T, D], [B, 1, T, D/2] twice
    """Turn the pairs (x[i], x[i + D/2]) by their angles: the half-split layout."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # [..., H] -> [..., H] float32
        """Return the scaled rows; fp32 whatever x is."""
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """Causal attention with grouped key/value heads and rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.group = config.num_attention_heads // config.num_key_value_heads
        query = config.num_attention_heads * config.head_dim
        key = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key, bias=False)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=False)

    def forward(  # [B, T, H] -> [B, T, H]
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        positions: Tensor,
        cached: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """Attend to x itself, or, with cached keys and values, to all up to each position."""
        B, T, _ = x.shape
        q, k, v = (
            projection(x).view(B, T, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *turn), rotate(k, *turn)
        mask = None
        if cached is not None:
            slots = positions[:, None, :, None].expand_as(k)
            length = int(positions.max()) + 1
            k, v = (
                kept.scatter_(2, slots, new)[:, :, :length]
                for kept, new in zip(cached, (k, v), strict=True)
            )
            mask = torch.arange(length, device=x.device) <= positions[:, None, :, None]
        k, v = (part.repeat_interleave(self.group, dim=1) for part in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        mixed: Tensor = self.o_proj(out.transpose(1, 2).reshape(B, T, -1))
        return mixed


class Mlp(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, H] -> [B, T, H]
        """Return what the feed-forward adds to the residual stream."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Attention and feed-forward, each behind its norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig, dropout: float) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        positions: Tensor,
        cached: tuple[Tensor, Tensor] | None,
    ) -> Tensor:  # [B, T, H] -> [B, T, H]
        """Return the residual stream after this layer."""
        mixed = self.self_attn(self.input_layernorm(x), turn, positions, cached)
        x = x + self.dropout(mixed)
        out: Tensor = x + self.dropout(self.mlp(self.post_attention_layernorm(x)))
        return out


class Llama(nn.Module):
    """The whole model; `state_dict` has the names of a Hugging Face checkpoint."""

    def __init__(self, config: LlamaConfig, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.dropout = nn.Dropout(dropout)
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
                "layers": nn.ModuleList(
                    Layer(config, dropout) for _ in range(config.num_hidden_layers)
                ),
                "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        positions = torch.arange(config.max_position_embeddings, dtype=torch.float64)
        angles = positions[:, None] * inverse_frequencies(config)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # What adds to the residual stream starts smaller: 2 such per layer add up.
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = 2 * config.num_hidden_layers if adds else 1
                nn.init.normal_(parameter, std=INITIAL_STD / math.sqrt(depth))

    def hidden(  # [B, T] -> [B, T, H]
        self, ids: Tensor, positions: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """Return the rows after the final norm.

        positions [B, T] counts from 0 where it is not given. A cache is written at the positions
        and read up to them, so that rows of different lengths may share a batch.
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        cos, sin = self.get_buffer("cos"), self.get_buffer("sin")
        turn = cos[positions][:, None], sin[positions][:, None]
        x = self.dropout(self.model["embed_tokens"](ids))
        for i, layer in enumerate(self.model["layers"].children()):
            x = layer(x, turn, positions, None if cache is None else cache[i])
        out: Tensor = self.model["norm"](x)
        return out

    def forward(self, ids: Tensor) -> Tensor:  # [B, T] -> [B, T, V]
        """Return the logits after each token."""
        logits: Tensor = self.lm_head(self.hidden(ids))
        return logits

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Return room for the keys and values of `length` positions a row."""
        config = self.config
        shape = (batch, config.num_key_value_heads, length, config.head_dim)
        device = self.lm_head.weight.device
        return [
            (torch.zeros(shape, device=device), torch.zeros(shape, device=device))
            for _ in range(config.num_hidden_layers)
        ]
