"""Paged batches as cases: sequences of chosen lengths, in shuffled blocks among garbage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from support.hard_matrices import matrix

PAGE = 16
# Values have to be finite: "special" and "patterns" are for queries and keys.
FINITE = ("normal", "scaled", "wide", "cancelling", "subnormal", "small", "huge", "sparse", "ties")


@dataclass(frozen=True)
class Shape:
    """Heads and type of one attention."""

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Drawn:
    """One sequence: its queries, the last of its keys, and all of its keys and values."""

    q: Tensor  # [T, Hq, D]
    k: Tensor  # [S, Hkv, D]
    v: Tensor


@dataclass(frozen=True)
class Batch:
    """The arguments of `paged_attention`, in its order."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    query_start: Tensor
    seq_lens: Tensor

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return (
            self.q, self.k_cache, self.v_cache, self.block_tables, self.query_start, self.seq_lens,
        )  # fmt: skip


def sequence(
    tokens: int,
    keys: int,
    shape: Shape,
    seed: int,
    kinds: tuple[str, str, str] = ("normal", "normal", "normal"),
    device: torch.device | str = "cpu",
) -> Drawn:
    """kinds: of queries, keys and values, as `hard_matrices.matrix` names them."""
    sizes = ((tokens, shape.heads), (keys, shape.kv_heads), (keys, shape.kv_heads))
    drawn = [
        matrix(kind, rows * heads, shape.head_dim, shape.dtype, 10 * seed + i)
        .view(rows, heads, shape.head_dim)
        .to(device)
        for i, (kind, (rows, heads)) in enumerate(zip(kinds, sizes, strict=True))
    ]
    return Drawn(*drawn)


def random_sequence(
    tokens: int, keys: int, shape: Shape, seed: int, device: torch.device | str
) -> Drawn:
    """Standard normal values, drawn where they are needed: for lengths that matter."""
    g = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, heads: int) -> Tensor:
        size = (rows, heads, shape.head_dim)
        return torch.randn(size, device=device, generator=g).to(shape.dtype)

    keys_and_values = draw(keys, shape.kv_heads), draw(keys, shape.kv_heads)
    return Drawn(draw(tokens, shape.heads), *keys_and_values)


def batch(sequences: Sequence[Drawn], seed: int = 0, page: int = PAGE) -> Batch:
    """Lay sequences into a cache: blocks shuffled, NaN wherever no key is, wild table entries."""
    first = sequences[0].k
    g = torch.Generator().manual_seed(seed)
    counts = [-(-len(s.k) // page) for s in sequences]
    order = torch.randperm(sum(counts) + 2, generator=g)  # two blocks stay unused
    width = max(counts) + 1
    tables = torch.full((len(sequences), width), 2**31 - 1, dtype=torch.int32)
    shape = (len(order), page, *first.shape[1:])
    keys, values = (
        torch.full(shape, torch.nan, dtype=first.dtype, device=first.device) for _ in "kv"
    )
    used = 0
    for r, (one, count) in enumerate(zip(sequences, counts, strict=True)):
        mine = order[used : used + count]
        used += count
        tables[r, :count] = mine.int()
        where = (mine[:, None] * page + torch.arange(page)).flatten()[: len(one.k)]
        for cache, of_one in ((keys, one.k), (values, one.v)):
            cache.view(-1, *first.shape[1:])[where.to(first.device)] = of_one
    tokens = torch.tensor([len(s.q) for s in sequences])
    starts = torch.nn.functional.pad(tokens.cumsum(0), (1, 0)).int()
    lengths = torch.tensor([len(s.k) for s in sequences], dtype=torch.int32)
    tables, starts, lengths = (x.to(first.device) for x in (tables, starts, lengths))
    return Batch(torch.cat([s.q for s in sequences]), keys, values, tables, starts, lengths)


def of_lengths(
    lengths: Sequence[tuple[int, int]],
    shape: Shape,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[Drawn]:
    """Ordinary sequences of (query tokens, keys)."""
    return [
        sequence(tokens, keys, shape, seed + i, device=device)
        for i, (tokens, keys) in enumerate(lengths)
    ]
