"""Causal attention with grouped queries: keys in blocks, ascending, with an online softmax.

Blocks are counted from the sequence's first key and never from the query or the chunk, so a row's
bits do not depend on how the prompt was fed. Every `key_split` keys a new partial sum begins, also
where nobody splits the work; partial sums are folded in ascending order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import Contract
from .elementary import exp2
from .floats import fma, round_to
from .polynomials import SOFTMAX_SCALE
from .tensor_core import matmul
from .tree import tree_sum


@dataclass
class _Partial:
    """The state of R rows' softmax: highest score m [R], sum den [R], values acc [R, D]."""

    m: Tensor
    den: Tensor
    acc: Tensor

    @classmethod
    def empty(cls, q: Tensor) -> _Partial:  # [R, D]
        rows, device = len(q), q.device
        return cls(
            torch.full((rows,), -torch.inf, device=device),
            torch.zeros(rows, device=device),
            torch.zeros(q.shape, device=device),
        )


def attention(  # [T, Hq, D], [S, Hkv, D], [S, Hkv, D] -> [T, Hq, D]
    q: Tensor, k: Tensor, v: Tensor, *, contract: Contract
) -> Tensor:
    """Return softmax(q k^T / sqrt(D)) v for queries that are the last T of S positions.

    q, k, v: one dtype, bf16 or fp16, D 64 or 128, Hq a multiple of Hkv: query head h reads
    key/value head h // (Hq / Hkv). Raises TypeError or ValueError for anything else.
    """
    _check(q, k, v)
    (rows, heads, head_dim), keys = q.shape, k.shape[0]
    group = heads // k.shape[1]
    last_key = torch.arange(keys - rows, keys, device=q.device).repeat_interleave(group)  # [T * G]
    out = torch.empty_like(q)
    for head in range(k.shape[1]):
        mine = slice(head * group, (head + 1) * group)
        queries = q[:, mine].reshape(-1, head_dim)
        sums = _splits(queries, k[:, head], v[:, head], last_key, contract)
        result = sums.acc / sums.den[:, None] + 0.0  # RN; -0 to +0
        out[:, mine] = round_to(result, v.dtype).view(rows, group, head_dim)  # RN
    return out


def paged_attention(
    q: Tensor,  # [T, Hq, D]
    k_cache: Tensor,  # [B, block size, Hkv, D]
    v_cache: Tensor,
    block_tables: Tensor,  # [R, W]
    query_start: Tensor,  # [R + 1]
    seq_lens: Tensor,  # [R]
    *,
    contract: Contract,
) -> Tensor:
    """Return `attention` of R sequences whose keys and values lie in a paged cache, [T, Hq, D].

    Sequence r: rows query_start[r] to query_start[r + 1] of q, the last of its seq_lens[r]
    positions; key j in block block_tables[r, j // block size]. Integers of any type.
    """
    out = torch.empty_like(q)
    starts, size = query_start.tolist(), k_cache.shape[1]
    for r, length in enumerate(seq_lens.tolist()):
        blocks = block_tables[r, : -(-length // size)].long()
        k, v = (c[blocks].flatten(0, 1)[:length] for c in (k_cache, v_cache))
        rows = slice(starts[r], starts[r + 1])
        out[rows] = attention(q[rows], k, v, contract=contract)
    return out


def _splits(q: Tensor, k: Tensor, v: Tensor, last_key: Tensor, contract: Contract) -> _Partial:
    """Fold the partial sums of all splits, ascending; last_key [R] is the last a row may see."""
    whole = _Partial.empty(q)
    for first in range(0, len(k), contract.key_split):
        keys = slice(first, first + contract.key_split)
        rows = (last_key >= first).nonzero()[:, 0]  # the others see nothing of this split
        part = _blocks(q[rows], k[keys], v[keys], last_key[rows] - first, contract)
        old = whole.m[rows]
        highest = torch.fmax(old, part.m)
        before, new = _weight(old, highest), _weight(part.m, highest)
        whole.m[rows] = highest
        whole.den[rows] = fma(whole.den[rows], before, part.den * new)  # RN, RN
        whole.acc[rows] = fma(whole.acc[rows], before[:, None], part.acc * new[:, None])  # RN, RN
    return whole


def _blocks(q: Tensor, k: Tensor, v: Tensor, last_key: Tensor, contract: Contract) -> _Partial:
    """Sum over one split, block after block; last_key counts from the split's first key."""
    size, count = contract.key_block, -(-len(k) // contract.key_block)
    score = matmul(q, k.t(), arch=contract.arch) * SOFTMAX_SCALE[q.shape[1]]  # RN
    hidden = torch.arange(len(k), device=q.device) > last_key[:, None]
    score = F.pad(
        torch.where(hidden, -torch.inf, score), (0, count * size - len(k)), value=-torch.inf
    )
    score = score.view(len(q), count, size)
    highest = _highest(score).cummax(1).values  # after each block
    before = F.pad(highest[:, :-1], (1, 0), value=-torch.inf)
    p = exp2(score - _finite(highest)[..., None])  # RN the difference
    keep, sums = _weight(before, highest), tree_sum(p)  # p unrounded here
    p = round_to(p, v.dtype)  # RN: for the tensor core
    state = _Partial.empty(q)
    state.m = highest[:, -1]
    for block in range(count):
        keys = slice(block * size, min(block * size + size, len(k)))
        # A block of which a row sees nothing would not change it.
        rows = (last_key >= keys.start).nonzero()[:, 0]
        kept = keep[rows, block]
        state.den[rows] = fma(state.den[rows], kept, sums[rows, block])  # RN
        acc = state.acc[rows] * kept[:, None]  # RN
        weights = p[rows, block, : keys.stop - keys.start]
        state.acc[rows] = matmul(weights, v[keys], acc, arch=contract.arch)  # the tensor core's RZ
    return state


def _weight(old: Tensor, new: Tensor) -> Tensor:
    """Return what a sum is multiplied by when the highest score rises from old to new."""
    return exp2(old - _finite(new))  # RN the difference


def _finite(highest: Tensor) -> Tensor:
    """Return 0 in place of -inf: nothing was seen yet, and -inf - -inf would be NaN."""
    return torch.where(highest > -torch.inf, highest, 0.0)


def _highest(score: Tensor) -> Tensor:
    """Return the maximum of each block; NaN loses to numbers, as PTX's max has it."""
    return torch.where(score.isnan(), -torch.inf, score).amax(-1)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in (torch.bfloat16, torch.float16) or {k.dtype, v.dtype} != {q.dtype}:
        raise TypeError(
            f"expected q, k, v of one dtype, bfloat16 or float16, found {q.dtype}, {k.dtype}, "
            f"{v.dtype}"
        )
    if any(x.dim() != 3 for x in (q, k, v)) or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"expected q [T, Hq, D], k and v [S, Hkv, D], found {list(q.shape)}, {list(k.shape)}, "
            f"{list(v.shape)}"
        )
    if q.shape[2] not in SOFTMAX_SCALE:
        known = " or ".join(map(str, SOFTMAX_SCALE))
        raise ValueError(f"expected a head size of {known}, found {q.shape[2]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"expected query heads to be a multiple of key/value heads, found {q.shape[1]} and "
            f"{k.shape[1]}"
        )
    if q.shape[0] > k.shape[0]:
        raise ValueError(
            f"expected queries to be the last of the keys' positions, found {q.shape[0]} queries "
            f"and {k.shape[0]} keys"
        )
