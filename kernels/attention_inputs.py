"""What attention is given: checked once, then handed to every launch in one piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitassay.kernels.checks import adjacent
from bitassay.kernels.device import check_same_device
from bitassay.reference.spec.contract import Contract
from bitassay.reference.spec.dtypes import require_dtype
from bitassay.reference.spec.polynomials import SOFTMAX_SCALE


@dataclass(frozen=True)
class Inputs:
    """The arguments of `paged_attention` that fit each other."""

    q: Tensor  # [T, Hq, D]
    k_cache: Tensor  # [B, page, Hkv, D]
    v_cache: Tensor
    block_tables: Tensor  # [R, W]
    query_start: Tensor  # [R + 1]
    seq_lens: Tensor  # [R]
    out: Tensor  # [T, Hq, D]
    contract: Contract

    @property
    def sequences(self) -> int:
        """How many sequences there are."""
        return self.seq_lens.shape[0]

    @property
    def kv_heads(self) -> int:
        """How many key/value heads there are."""
        return self.k_cache.shape[2]

    @property
    def group(self) -> int:
        """How many query heads read one key/value head."""
        return self.q.shape[1] // self.kv_heads

    @property
    def pointers(self) -> tuple[Tensor, ...]:
        """The tensors that a kernel reads and writes, in its order."""
        return (
            self.q, self.k_cache, self.v_cache, self.block_tables, self.query_start, self.seq_lens,
            self.out,
        )  # fmt: skip

    @property
    def strides(self) -> tuple[int, ...]:
        """Their strides, in the kernels' order; the last axis of each is contiguous."""
        return (
            *self.q.stride()[:2], *self.k_cache.stride()[:3], *self.v_cache.stride()[:3],
            self.block_tables.stride(0), *self.out.stride()[:2],
        )  # fmt: skip

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernels are compiled for besides the tile."""
        head_dim, block = self.q.shape[2], self.contract.key_block
        return {
            "SCALE": SOFTMAX_SCALE[head_dim], "GROUP": self.group,
            "PAGE": self.k_cache.shape[1], "D": head_dim,
            "BLOCK_N": block, "BLOCKS": self.contract.key_split // block,
        }  # fmt: skip

    def check(self) -> None:
        """Raise TypeError or ValueError, naming what was expected, for what does not fit."""
        q, k, v, out = self.q, self.k_cache, self.v_cache, self.out
        require_dtype("transformer", q=q.dtype, k_cache=k.dtype, v_cache=v.dtype, out=out.dtype)
        if q.dim() != 3 or k.dim() != 4 or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
            raise ValueError(
                "expected q [T, Hq, D], k_cache and v_cache [B, block size, Hkv, D], found "
                f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
            )
        if q.shape[2] not in SOFTMAX_SCALE:
            known = " or ".join(map(str, SOFTMAX_SCALE))
            raise ValueError(f"expected a head size of {known}, found {q.shape[2]}")
        if self.kv_heads == 0 or q.shape[1] == 0 or q.shape[1] % self.kv_heads:
            raise ValueError(
                "expected query heads to be a multiple of key/value heads, found "
                f"{q.shape[1]} and {self.kv_heads}"
            )
        if out.shape != q.shape:
            raise ValueError(f"out: expected {list(q.shape)}, found {list(out.shape)}")
        for name, x in (("q", q), ("k_cache", k), ("v_cache", v), ("out", out)):
            if x.stride(-1) != 1:
                raise ValueError(
                    f"{name}: expected a head's {x.shape[-1]} values side by side, found a stride "
                    f"of {x.stride(-1)}: make it contiguous"
                )
        self._check_tables()
        check_same_device(*self.pointers)

    def _check_tables(self) -> None:
        entries = self.block_tables.shape[-1:]
        for name, table, shape in (
            ("seq_lens", self.seq_lens, (*self.seq_lens.shape[:1],)),
            ("query_start", self.query_start, (self.sequences + 1,)),
            ("block_tables", self.block_tables, (self.sequences, *entries)),
        ):
            if table.dtype != torch.int32 or table.shape != shape:
                raise ValueError(
                    f"{name}: expected int32 {list(shape)}, found {table.dtype} {list(table.shape)}"
                )
            if not adjacent(table):
                raise ValueError(f"{name}: expected adjacent entries: make it contiguous")
