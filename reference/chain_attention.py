"""Attention of drafted rows: to a sequence's keys, and behind them to each row's own.

Drafts after different tokens of one sequence share the keys before those tokens and nothing else.
Here they are computed together, to the bits of `attention` over each row's keys put in one piece.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitassay.reference.attention import Keys, attend_head
from bitassay.reference.spec.contract import Contract
from bitassay.reference.tensor_core import matmul

# Rows whose own keys go through one product, of which all but the diagonal is thrown away.
_TOGETHER = 32


def chain_attention(
    q: Tensor,  # [R, Hq, D]
    k: Tensor,  # [S, Hkv, D]
    v: Tensor,
    shared: Tensor,  # [R]
    own_k: Tensor,  # [R, J, Hkv, D]
    own_v: Tensor,
    *,
    contract: Contract,
) -> Tensor:
    """Return each row's `attention` over the first shared[r] of k, v and its J own after them.

    The query is the last of those positions; dtypes as `attention`. Returns [R, Hq, D].
    """
    rows, heads, head_dim = q.shape
    group = heads // k.shape[1]
    out = torch.empty_like(q)
    for head in range(k.shape[1]):
        mine = slice(head * group, (head + 1) * group)
        queries = q[:, mine].reshape(-1, head_dim)
        keys = _ChainKeys(
            queries, k[:, head], v[:, head], shared, own_k[:, :, head], own_v[:, :, head], contract
        )
        last_key = (shared + own_k.shape[1] - 1).repeat_interleave(group)
        out[:, mine] = attend_head(queries, keys, last_key).view(rows, group, head_dim)
    return out


class _ChainKeys(Keys):
    """Keys of which the first are shared: R rows of G queries each, numbered row after row."""

    def __init__(
        self,
        q: Tensor,  # [R * G, D]
        k: Tensor,  # [S, D]
        v: Tensor,
        shared: Tensor,  # [R]
        own_k: Tensor,  # [R, J, D]
        own_v: Tensor,
        contract: Contract,
    ) -> None:
        super().__init__(k, v, contract)
        self._shared, self._own_v, self._group = shared, own_v, len(q) // len(shared)
        self._own_scores = self._diagonal(q, own_k)  # [R * G, J]

    def __len__(self) -> int:
        return int(self._shared.max()) + self._own_v.shape[1]

    def scores(self, q: Tensor, rows: Tensor, at: slice) -> Tensor:
        width = at.stop - at.start
        score = torch.zeros(len(q), width)
        before = super().scores(q, rows, at)  # of the shared keys, as far as they go
        score[:, : before.shape[1]] = before
        for j, own in enumerate(self._own_scores[rows].unbind(1)):
            column = self._shared[rows // self._group] + j - at.start
            within = (column >= 0) & (column < width)
            score[within, column[within]] = own[within]
        return score

    def weigh(self, p: Tensor, rows: Tensor, at: slice, acc: Tensor) -> Tensor:
        acc, group = acc.clone(), self._group
        shared = self._shared[rows // group]
        whole = shared >= at.stop  # these see shared values alone
        if whole.any():
            acc[whole] = super().weigh(p[whole], rows[whole], at, acc[whole])
        # A row's queries see the same keys: here they are all, one after the other.
        for first in (~whole).nonzero()[::group, 0].tolist():
            mine, count = slice(first, first + group), int(shared[first])
            own = self._own_v[int(rows[first]) // group]
            values = torch.cat(
                [self.v[at.start : count], own[max(0, at.start - count) : at.stop - count]]
            )
            weights = p[mine, : len(values)]
            acc[mine] = matmul(weights, values, acc[mine], arch=self.contract.arch)
        return acc

    def _diagonal(self, q: Tensor, own_k: Tensor) -> Tensor:
        count, group = own_k.shape[1], self._group
        parts = []
        for first in range(0, len(own_k), _TOGETHER):
            k = own_k[first : first + _TOGETHER]
            some = q[first * group : (first + len(k)) * group]
            products = matmul(some, k.flatten(0, 1).t(), arch=self.contract.arch)
            each = torch.arange(len(some))
            parts.append(products.view(len(some), len(k), count)[each, each // group])
        return torch.cat(parts)
