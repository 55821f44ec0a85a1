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

from bitassay.reference.elementary import exp2
from bitassay.reference.floats import fma, round_to
from bitassay.reference.spec.contract import Contract
from bitassay.reference.spec.dtypes import require_dtype
from bitassay.reference.spec.polynomials import SOFTMAX_SCALE
from bitassay.reference.tensor_core import matmul
from bitassay.reference.tree import tree_sum


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
        mixed = attend_head(queries, Keys(k[:, head], v[:, head], contract), last_key)
        out[:, mine] = mixed.view(rows, group, head_dim)
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


class Keys:
    """The keys and values of one head, [S, D], that queries attend to; the same for every query."""

    def __init__(self, k: Tensor, v: Tensor, contract: Contract) -> None:
        self.k, self.v, self.contract = k, v, contract

    def __len__(self) -> int:
        """How many there are."""
        return len(self.k)

    def scores(self, q: Tensor, rows: Tensor, at: slice) -> Tensor:  # [R, D], [R] -> [R, n]
        """Return the products of queries, by their numbers, with the n keys of a range."""
        return matmul(q, self.k[at].t(), arch=self.contract.arch)

    def weigh(  # [R, n], [R], [R, D] -> [R, D]
        self, p: Tensor, rows: Tensor, at: slice, acc: Tensor
    ) -> Tensor:
        """Return acc with the n values of a range added, weighted for each query."""
        return matmul(p, self.v[at], acc, arch=self.contract.arch)


def attend_head(q: Tensor, keys: Keys, last_key: Tensor) -> Tensor:  # [R, D], [R] -> [R, D]
    """Return the output of one head's queries; last_key: the last key that each may see."""
    sums = _splits(q, keys, last_key)
    result = sums.acc / sums.den[:, None] + 0.0  # RN; -0 to +0
    return round_to(result, q.dtype)  # RN


def _splits(q: Tensor, keys: Keys, last_key: Tensor) -> _Partial:
    """Fold the partial sums of all splits, ascending; last_key [R] is the last a row may see."""
    whole, size = _Partial.empty(q), keys.contract.key_split
    for first in range(0, len(keys), size):
        rows = (last_key >= first).nonzero()[:, 0]  # the others see nothing of this split
        split = slice(first, min(first + size, len(keys)))
        part = _blocks(q[rows], keys, rows, split, last_key[rows])
        old = whole.m[rows]
        highest = torch.fmax(old, part.m)
        before, new = _weight(old, highest), _weight(part.m, highest)
        whole.m[rows] = highest
        whole.den[rows] = fma(whole.den[rows], before, part.den * new)  # RN, RN
        whole.acc[rows] = fma(whole.acc[rows], before[:, None], part.acc * new[:, None])  # RN, RN
    return whole


def _blocks(q: Tensor, keys: Keys, ids: Tensor, split: slice, last_key: Tensor) -> _Partial:
    """Sum over one split, block after block, for the queries of the numbers `ids`."""
    size, width = keys.contract.key_block, split.stop - split.start
    count = -(-width // size)
    score = keys.scores(q, ids, split) * SOFTMAX_SCALE[q.shape[1]]  # RN
    hidden = torch.arange(split.start, split.stop, device=q.device) > last_key[:, None]
    score = F.pad(
        torch.where(hidden, -torch.inf, score), (0, count * size - width), value=-torch.inf
    )
    score = score.view(len(q), count, size)
    highest = _highest(score).cummax(1).values  # after each block
    before = F.pad(highest[:, :-1], (1, 0), value=-torch.inf)
    p = exp2(score - _finite(highest)[..., None])  # RN the difference
    keep, sums = _weight(before, highest), tree_sum(p)  # p unrounded here
    p = round_to(p, q.dtype)  # RN: for the tensor core
    state = _Partial.empty(q)
    state.m = highest[:, -1]
    for block in range(count):
        first = split.start + block * size
        at = slice(first, min(first + size, split.stop))
        # A block of which a row sees nothing would not change it.
        rows = (last_key >= first).nonzero()[:, 0]
        kept = keep[rows, block]
        state.den[rows] = fma(state.den[rows], kept, sums[rows, block])  # RN
        acc = state.acc[rows] * kept[:, None]  # RN
        weights = p[rows, block, : at.stop - first]
        state.acc[rows] = keys.weigh(weights, ids[rows], at, acc)  # the tensor core's RZ
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
    require_dtype("transformer", q=q.dtype, k=k.dtype, v=v.dtype)
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
