"""What one forward pass is given: rows of any sequences, and where their keys and values lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bitassay.engine.models.kv_cache import PagedCache, slots_of


@dataclass(frozen=True)
class Segment:
    """Adjacent rows of one sequence in a step: `count` of them from position `first` on."""

    sequence: int
    first: int
    count: int

    @property
    def end(self) -> int:
        """The position after its last row: how many keys the sequence has then."""
        return self.first + self.count


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


_TENSORS = ("positions", "slots", "query_start", "seq_lens", "block_tables")


def place(segments: Sequence[Segment], tables: Sequence[list[int]]) -> Placement:
    """Return the placement, on the CPU, of one segment a sequence; tables: its blocks."""
    positions = [p for s in segments for p in range(s.first, s.end)]
    slots = [
        slot
        for s, table in zip(segments, tables, strict=True)
        for slot in slots_of(table, range(s.first, s.end))
    ]
    starts = [0]
    for segment in segments:
        starts.append(starts[-1] + segment.count)
    width = max(map(len, tables))
    # What a shorter table is padded with is never read.
    padded = [table + [0] * (width - len(table)) for table in tables]
    return Placement(
        positions=torch.tensor(positions, dtype=torch.int64),
        slots=torch.tensor(slots, dtype=torch.int64),
        query_start=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor([s.end for s in segments], dtype=torch.int32),
        block_tables=torch.tensor(padded, dtype=torch.int32),
        max_query_len=max(s.count for s in segments),
        max_seq_len=max(s.end for s in segments),
    )


def upload(placements: Sequence[Placement], device: torch.device) -> list[Placement]:
    """Return placements on a device, copied together: one copy a field, whatever their number.

    A copy from ordinary memory waits for the device, so a run makes all of them before its first
    step.
    """
    columns: dict[str, list[Tensor]] = {}
    for name in _TENSORS:
        columns[name] = upload_all([getattr(p, name) for p in placements], device)
    return [
        Placement(
            **{name: column[i] for name, column in columns.items()},
            max_query_len=placement.max_query_len,
            max_seq_len=placement.max_seq_len,
            padded=placement.padded,
        )
        for i, placement in enumerate(placements)
    ]


def upload_all(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return tensors of one dtype on a device, as views of one copy."""
    if not tensors:
        return []
    together = torch.cat([t.flatten() for t in tensors]).to(device)
    parts = together.split([t.numel() for t in tensors])
    return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]
