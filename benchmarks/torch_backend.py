"""The engine's operations as plain PyTorch has them: what a run without invariance would call.

Choosing tokens and fingerprints stay the kernels'; everything between is cuBLAS,
scaled_dot_product_attention and torch's own operations, whose bits depend on the batch. Nothing
waits for the device, so CUDA graphs may hold all of it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from bitassay.engine.models.causal_lm import CausalLM
from bitassay.engine.models.eagle import EagleHead
from bitassay.engine.models.kv_cache import PagedCache
from bitassay.engine.models.ops import Ops, kernel_ops


class TorchLM(CausalLM):
    """A model for this ops: a key that is masked must be a number all the same."""

    def new_cache(self, blocks: int) -> PagedCache:
        """Return a cache of zeros."""
        return _cleared(super().new_cache(blocks))


class TorchHead(EagleHead):
    """A draft head for this ops."""

    def new_cache(self, blocks: int) -> PagedCache:
        """Return a cache of zeros."""
        return _cleared(super().new_cache(blocks))


def _cleared(cache: PagedCache) -> PagedCache:
    for x in (*cache.k, *cache.v):
        x.zero_()
    return cache


def torch_ops() -> Ops:
    """Return the kernels' backend with torch's operations in place of the invariant ones."""
    return replace(
        kernel_ops(),
        name="torch",
        embedding=lambda ids, weight: F.embedding(ids, weight),
        linear=lambda x, weight, bias=None, **_: F.linear(x, weight, bias),
        lm_head=lambda x, weight, bias=None, **_: F.linear(x, weight, bias),
        rms_norm=_rms_norm,
        add_rms_norm=_add_rms_norm,
        add=lambda x, residual, out=None: torch.add(x, residual, out=out),
        rotary=_rotary,
        silu_and_mul=_silu_and_mul,
        write_cache=_write_cache,
        paged_attention=_paged_attention,
        check=lambda: None,
        check_device=lambda device, arch: None,
    )


def _rms_norm(x: Tensor, weight: Tensor, *, eps: float, out: Tensor | None = None) -> Tensor:
    normed = F.rms_norm(x, weight.shape, weight, eps)
    return normed if out is None else out.copy_(normed)


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def _silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=1)
    return F.silu(gate) * up


def _rotary(  # [T, Hq, D], [T, Hkv, D], [T], [P, D / 2] x 2
    q: Tensor, k: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, *, out: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    places = positions.clamp(0, len(cos) - 1)
    c, s = (t[places][:, None].to(q.dtype) for t in (cos, sin))
    for x, turned in zip((q, k), out, strict=True):
        first, second = x.chunk(2, dim=-1)
        torch.cat([first * c - second * s, second * c + first * s], dim=-1, out=turned)
    return out


def _write_cache(  # [T, Hkv, D] x 2, [B, 16, Hkv, D] x 2, [T]
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor
) -> None:
    # A row without a slot writes what the first row with one does, so that order is free; where
    # none has, all write what lies in the first slot already.
    kept = slots >= 0
    first = kept.int().argmax(0, keepdim=True)  # [1]: a number would have to be waited for
    places = torch.where(kept, slots, slots.index_select(0, first)).clamp_min(0)
    for x, cache in ((k, k_cache), (v, v_cache)):
        flat = cache.flatten(0, 1)
        instead = torch.where(kept.any(), x.index_select(0, first), flat[:1])
        flat.index_copy_(0, places, torch.where(kept[:, None, None], x, instead))


def _paged_attention(
    q: Tensor,  # [T, Hq, D]
    k_cache: Tensor,  # [B, 16, Hkv, D]
    v_cache: Tensor,
    block_tables: Tensor,  # [R, W]
    query_start: Tensor,  # [R + 1]
    seq_lens: Tensor,  # [R]
    *,
    max_query_len: int,
    max_seq_len: int,
    out: Tensor | None = None,
    **_: object,
) -> Tensor:
    """Gather each sequence's keys and values side by side, then attend to them under a mask."""
    sequences, most = len(seq_lens), len(q) - 1
    blocks = block_tables[:, : -(-max_seq_len // k_cache.shape[1])].long()
    k, v = (cache[blocks].flatten(1, 2).transpose(1, 2) for cache in (k_cache, v_cache))
    counts = query_start.diff()
    offsets = torch.arange(max_query_len, device=q.device)
    rows = (query_start[:-1, None] + offsets).clamp_max(most).long()  # [R, M]
    last = (seq_lens - counts)[:, None] + offsets  # the key of each row's own position
    keys = torch.arange(k.shape[2], device=q.device)
    # A row beyond its sequence's sees one key, so that it is a number.
    seen = keys <= last.clamp_min(0)[:, :, None]
    attended = F.scaled_dot_product_attention(
        q[rows].transpose(1, 2), k, v, attn_mask=seen[:, None], enable_gqa=True
    ).transpose(1, 2)
    places = torch.arange(len(q), device=q.device)
    owner = torch.searchsorted(query_start[1:].contiguous(), places.int(), right=True)
    owner = owner.clamp_max(sequences - 1)
    within = (places - query_start[owner]).clamp(0, max_query_len - 1)
    result = attended[owner, within]
    return result if out is None else out.copy_(result)
