"""What one forward pass is given: rows of any sequences, and where their keys and values lie."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from bitassay.engine.models.kv_cache import PagedCache


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the T rows of R sequences stand, sequence after sequence.

    positions, slots: int64 [T], slot = block * 16 + offset. query_start: int32 [R + 1], the rows
    of each sequence. seq_lens: int32 [R], its keys, those of its rows included. block_tables:
    int32 [R, W]. max_query_len, max_seq_len: of the longest or more, known without asking the
    device. padded: whether rows may follow the last sequence's; they belong to none, and what is
    computed of them is used by nothing.
    """

    positions: Tensor
    slots: Tensor
    query_start: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    max_query_len: int
    max_seq_len: int
    padded: bool = False


@dataclass(frozen=True, kw_only=True)
class Batch(Placement):
    """A placement with the rows' token ids, int64 [T], and the cache that its slots are in.

    All tensors are on the cache's device.
    """

    ids: Tensor
    cache: PagedCache

    @classmethod
    def of(cls, placement: Placement, ids: Tensor, cache: PagedCache) -> Batch:
        """Return the batch of a placement."""
        values = {field.name: getattr(placement, field.name) for field in fields(Placement)}
        return cls(**values, ids=ids, cache=cache)
