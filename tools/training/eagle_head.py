"""An EAGLE-1 draft head in plain PyTorch, in the form that learns: every chain at once.

Names and layout are those of the published EAGLE heads, so its weights load there unchanged. It
learns weights and estimates how well they draft; the bits that count come from the reference.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.llama import (
    INITIAL_STD,
    Attention,
    Llama,
    LlamaConfig,
    Mlp,
    RMSNorm,
    inverse_frequencies,
    rotate,
)

Attended = tuple[Tensor, Tensor]  # keys and values, [B, N, T, D] each


class DraftLayer(nn.Module):
    """A decoder layer without a norm before its attention: what EAGLE-1 drafts with."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class EagleHead(nn.Module):
    """The head alone; embeddings and lm_head are the target's.

    embedding_scale: what embeddings are multiplied by before fc. The target's are far smaller than
    its hidden rows, and AdamW's steps know no such difference. `tensors` multiplies it into
    fc.weight, so that a checkpoint has none.
    """

    def __init__(self, config: LlamaConfig, embedding_scale: float = 1.0) -> None:
        super().__init__()
        if config.num_hidden_layers != 1:
            raise ValueError(f"expected a head of 1 layer, found {config.num_hidden_layers}")
        self.config = config
        self.embedding_scale = embedding_scale
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([DraftLayer(config)])
        positions = torch.arange(config.max_position_embeddings, dtype=torch.float64)
        angles = positions[:, None] * inverse_frequencies(config)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=INITIAL_STD)

    def forward(self, embedded: Tensor, hidden: Tensor, depth: int) -> list[Tensor]:
        """Return the hidden rows [B, T, H] of the first pass and of depth - 1 chain rows after it.

        embedded, hidden: [B, T, H]; row p has the embedding of token p + 1 and the target's row p.
        Row p of result j is the j-th chain row of the first-pass row p - j, its drafts given as
        the tokens that do follow: it has the hidden output of row p - 1 of result j - 1, and
        attends to first-pass rows up to p - j and to its own chain. Rows p < j mean nothing.
        """
        rows, past, results = hidden, list[Attended](), []
        for _ in range(depth):
            out, own = self._rows(embedded, rows, past)
            past.append(own)
            results.append(out)
            rows = shifted(out, 1)
        return results

    def _rows(
        self, embedded: Tensor, hidden: Tensor, past: list[Attended]
    ) -> tuple[Tensor, Attended]:
        """Return hidden rows [B, T, H] and their own keys and values; past: of the rows before."""
        layer = self.layers[0]
        assert isinstance(layer, DraftLayer)
        attention = layer.self_attn
        x = self.fc(torch.cat([embedded * self.embedding_scale, hidden], dim=-1))
        B, T, _ = x.shape
        q, k, v = (
            projection(x).view(B, T, -1, attention.head_dim).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        turn = self.get_buffer("cos")[:T], self.get_buffer("sin")[:T]
        q, k = rotate(q, *turn), rotate(k, *turn)
        k, v = (part.repeat_interleave(attention.group, dim=1) for part in (k, v))
        mixed = _chain_attention(q, [*past, (k, v)])
        residual = x + attention.o_proj(mixed.transpose(1, 2).reshape(B, T, -1))
        out: Tensor = residual + layer.mlp(layer.post_attention_layernorm(residual))
        return out, (k, v)

    def tensors(self) -> dict[str, Tensor]:
        """Return the checkpoint's tensors in bf16, the embedding scale within fc.weight.

        A scale that is a power of 2 changes no rounding.
        """
        found = {name: tensor.detach().clone() for name, tensor in self.named_parameters()}
        found["fc.weight"][:, : self.config.hidden_size] *= self.embedding_scale
        return {name: tensor.to(torch.bfloat16) for name, tensor in found.items()}


def shifted(rows: Tensor, by: int) -> Tensor:  # [B, T, ...] -> [B, T, ...]
    """Return rows moved `by` places later, with zeros before them."""
    moved = torch.zeros_like(rows)
    moved[:, by:] = rows[:, : rows.shape[1] - by]
    return moved


def _chain_attention(q: Tensor, attended: list[Attended]) -> Tensor:  # [B, N, T, D] -> the same
    """Attend to the first pass up to j = len(attended) - 1 rows back, and to the chain's own rows.

    Row p of step j has the keys of step i ≥ 1 at position p - j + i alone: those of its own chain.
    """
    (k, v), chain = attended[0], attended[1:]
    depth = len(chain)
    if depth == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    T = q.shape[2]
    seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril(-depth)
    scores = [(q @ k.transpose(2, 3)).float().masked_fill(~seen, -math.inf)]
    values = []
    for i, (key, value) in enumerate(chain, 1):
        # Each row meets one key of a step: a product of rows, not of matrices.
        key, value = (
            shifted(part.transpose(1, 2), depth - i).transpose(1, 2) for part in (key, value)
        )
        scores.append((q * key).float().sum(-1, keepdim=True))
        values.append(value)
    weights = (torch.cat(scores, dim=-1) / math.sqrt(q.shape[3])).softmax(-1).to(v.dtype)
    mixed = weights[..., :T] @ v
    for i, value in enumerate(values):
        mixed = mixed + weights[..., T + i, None] * value
    return mixed


def embedding_scale(target: Llama) -> float:
    """Return the power of 2 nearest to how much larger the target's hidden rows are."""
    embedding, norm = target.model["embed_tokens"].weight, target.model["norm"].weight
    assert isinstance(embedding, Tensor)
    assert isinstance(norm, Tensor)
    # A normed row has about the size of its weights.
    ratio = float((norm.detach().square().mean() / embedding.detach().square().mean()).sqrt())
    return float(2.0 ** round(math.log2(ratio)))
