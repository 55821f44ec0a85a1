"""The oracle's attention on all cores: head by head in processes, each with one thread.

On a GPU the oracle's attention is thousands of short launches; a machine's cores are faster.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import TracebackType

import torch
from torch import Tensor

from bitassay.reference.attention import attention
from bitassay.reference.spec.contract import Contract

Packed = tuple[bytes, torch.Size]  # a tensor's values and its shape


class OraclePool:
    """A context in which `attend` works; processes end with it."""

    def __enter__(self) -> OraclePool:
        self._pool = ProcessPoolExecutor(
            os.cpu_count(), get_context("spawn"), torch.set_num_threads, (1,)
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def attend(
        self, sequences: Sequence[tuple[Tensor, Tensor, Tensor]], contract: Contract
    ) -> list[Tensor]:
        """Return `reference.attention` of each sequence's q, k and v, where its q is."""
        parts = [
            (part, self._pool.submit(_head, [_pack(x) for x in part], q.dtype, contract))
            for q, k, v in sequences
            for part in _heads(q, k, v)
        ]
        results = iter([_unpack(future.result(), part[0].dtype) for part, future in parts])
        return [
            torch.cat([next(results) for _ in range(k.shape[1])], dim=1).to(q.device)
            for q, k, _ in sequences
        ]

    def attend_paged(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_tables: Tensor,
        query_start: Tensor,
        seq_lens: Tensor,
        contract: Contract,
    ) -> Tensor:
        """Return `reference.paged_attention`."""
        starts, sequences, size = query_start.tolist(), [], k_cache.shape[1]
        for r, length in enumerate(seq_lens.tolist()):
            blocks = block_tables[r, : -(-length // size)].long()
            keys, values = (x[blocks].flatten(0, 1)[:length] for x in (k_cache, v_cache))
            sequences.append((q[starts[r] : starts[r + 1]], keys, values))
        return torch.cat(self.attend(sequences, contract))


def _heads(q: Tensor, k: Tensor, v: Tensor) -> list[tuple[Tensor, ...]]:
    """One key/value head with its group of query heads at a time, on the CPU."""
    heads = k.shape[1]
    queries = q.cpu().split(q.shape[1] // heads, dim=1)
    return list(zip(queries, k.cpu().split(1, dim=1), v.cpu().split(1, dim=1), strict=True))


def _head(packed: list[Packed], dtype: torch.dtype, contract: Contract) -> Packed:
    q, k, v = (_unpack(x, dtype) for x in packed)
    return _pack(attention(q, k, v, contract=contract))


def _pack(x: Tensor) -> Packed:
    """As bytes: torch would pass the tensor through shared memory, which may be scarce."""
    return x.contiguous().view(torch.uint8).numpy().tobytes(), x.shape


def _unpack(packed: Packed, dtype: torch.dtype) -> Tensor:
    data, shape = packed
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.view(shape)
