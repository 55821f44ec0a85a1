"""A step's numbers, packed on the host and brought to the device in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitassay.engine.models.batch import Batch
from bitassay.engine.models.kv_cache import PagedCache
from bitassay.engine.scheduling.blocks import BLOCK_SIZE
from bitassay.engine.scheduling.step_plan import Rows

_Array = np.ndarray[Any, Any]
_ALIGNED = 64  # bytes


@dataclass(frozen=True)
class Sizes:
    """The shapes of a step: all that a captured graph of it depends on.

    rows: T. sequences: R. choosing: rows that choose a token, C. tails: sequences that do, S.
    num_drafts: K. width: blocks of a table. max_query_len, max_seq_len: of the longest or more.
    padded: whether there may be less of everything than that.
    """

    rows: int
    sequences: int
    choosing: int
    tails: int
    num_drafts: int
    width: int
    max_query_len: int
    padded: bool = False

    @property
    def max_seq_len(self) -> int:
        """How many keys a table holds."""
        return self.width * BLOCK_SIZE

    @property
    def arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Every array's dtype and shape, as they lie behind one another."""
        tail = (self.tails,)
        return {
            "ids": ("int64", (self.rows,)),
            "positions": ("int64", (self.rows,)),
            "slots": ("int64", (self.rows,)),
            "next_ids": ("int64", (self.rows,)),
            "choosing": ("int64", (self.choosing,)),
            "tails": ("int64", (*tail, self.num_drafts + 1)),
            "drafted": ("int64", tail),
            "first": ("int64", tail),
            "limit": ("int64", tail),
            "sequence": ("int64", tail),
            "count": ("int64", (1,)),
            "query_start": ("int32", (self.sequences + 1,)),
            "seq_lens": ("int32", (self.sequences,)),
            "tables": ("int32", (self.sequences, self.width)),
        }

    @property
    def nbytes(self) -> int:
        """What the packed arrays take."""
        return _layout(self)[-1].end


class _Place(NamedTuple):
    """Where an array lies among the packed bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@lru_cache(4096)
def _layout(sizes: Sizes) -> list[_Place]:
    """Return where the arrays lie.

    Each begins on a boundary of 64 bytes: compilers look at what divides a pointer, and a step of
    another size must not need other kernels.
    """
    places, at = [], 0
    for name, (dtype, shape) in sizes.arrays.items():
        end = at + np.dtype(dtype).itemsize * prod(shape)
        places.append(_Place(name, dtype, shape, at, end))
        at = -(-end // _ALIGNED) * _ALIGNED
    return places


def sizes_of(step: Sequence[Rows], num_drafts: int) -> Sizes:
    """Return the shapes of a step as it is, unpadded."""
    choosing = [rows for rows in step if rows.chooses]
    return Sizes(
        rows=sum(len(rows.ids) for rows in step),
        sequences=len(step),
        choosing=sum(1 + rows.drafts for rows in choosing),
        tails=len(choosing),
        num_drafts=num_drafts,
        width=blocks_needed(step, num_drafts),
        max_query_len=max(len(rows.ids) for rows in step),
    )


def blocks_needed(step: Sequence[Rows], num_drafts: int) -> int:
    """Return how many blocks of a table a step reads at most, the drafts' chains included."""
    ends = (min(rows.first + len(rows.ids) + num_drafts, rows.limit + 1) for rows in step)
    return -(-max(ends) // BLOCK_SIZE)


def pack(step: Sequence[Rows], sizes: Sizes, out: _Array) -> None:
    """Write a step's arrays to out, bytes [sizes.nbytes]; what is padding belongs to no sequence.

    Padding rows have slot -1, and padding sequences no rows. next_ids is -1 where a row's own
    choice is the id after it. tails [S, K + 1]: of each sequence that chooses, the places among
    the choosing rows of its last known token and its drafts; beyond its drafts, the last again.
    """
    arrays = _views(out, sizes)
    for name, array in arrays.items():
        array.fill(-1 if name in ("slots", "next_ids") else 0)
    # Where there is padding, all rows choose, and the last of them is padding.
    arrays["choosing"][:] = np.arange(sizes.choosing)
    arrays["tails"][:] = sizes.choosing - 1
    counts = np.array([len(rows.ids) for rows in step], dtype=np.int64)
    ends = np.cumsum(counts)
    total = int(counts.sum())
    for r, rows in enumerate(step):
        some = rows.table[: sizes.width]
        arrays["tables"][r, : len(some)] = some
    firsts = np.array([rows.first for rows in step], dtype=np.int64)
    positions = np.arange(total) - np.repeat(ends - counts - firsts, counts)
    blocks = arrays["tables"][np.repeat(np.arange(len(step)), counts), positions // BLOCK_SIZE]
    arrays["positions"][:total] = positions
    arrays["slots"][:total] = blocks.astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
    arrays["query_start"][1:] = total
    arrays["query_start"][1 : len(step) + 1] = ends
    arrays["seq_lens"][: len(step)] = firsts + counts
    ids = arrays["ids"]
    ids[:total] = list(chain.from_iterable(rows.ids for rows in step))
    arrays["next_ids"][: max(0, total - 1)] = ids[1:total]
    known = [-1 if rows.next_id is None else rows.next_id for rows in step]
    arrays["next_ids"][ends - 1] = known
    _pack_tails(step, arrays, ends)


def _pack_tails(step: Sequence[Rows], arrays: dict[str, _Array], ends: _Array) -> None:
    """Write what there is of the sequences that choose."""
    some = [r for r, rows in enumerate(step) if rows.chooses]
    count = len(some)
    drafted = np.array([step[r].drafts for r in some], dtype=np.int64)
    after = np.cumsum(1 + drafted)  # places among the choosing rows
    before = after - 1 - drafted
    depth = np.arange(arrays["tails"].shape[1])
    arrays["tails"][:count] = before[:, None] + np.minimum(depth, drafted[:, None])
    choosing = np.repeat(ends[some] - after, 1 + drafted) + np.arange(after[-1] if count else 0)
    arrays["choosing"][: len(choosing)] = choosing
    arrays["next_ids"][choosing] = -1
    arrays["drafted"][:count] = drafted
    arrays["first"][:count] = [step[r].first + len(step[r].ids) - 1 - step[r].drafts for r in some]
    arrays["limit"][:count] = [step[r].limit for r in some]
    arrays["sequence"][:count] = some
    arrays["count"][0] = count


@dataclass(frozen=True)
class Inputs:
    """The arrays of `pack` on the device, and their shapes."""

    sizes: Sizes
    arrays: dict[str, Tensor]

    @classmethod
    def of(cls, buffer: Tensor, sizes: Sizes) -> Inputs:
        """Return views of a buffer of bytes."""
        return cls(
            sizes,
            {
                x.name: buffer[x.start : x.end].view(getattr(torch, x.dtype)).view(x.shape)
                for x in _layout(sizes)
            },
        )

    @classmethod
    def upload(cls, step: Sequence[Rows], num_drafts: int, device: torch.device) -> Inputs:
        """Return a step's arrays as they are, unpadded, from ordinary memory: it waits."""
        sizes = sizes_of(step, num_drafts)
        packed = np.empty(sizes.nbytes, dtype=np.uint8)
        pack(step, sizes, packed)
        return cls.of(torch.from_numpy(packed).to(device), sizes)

    def __getitem__(self, name: str) -> Tensor:
        """Return an array."""
        return self.arrays[name]

    def batch(self, ids: Tensor, cache: PagedCache) -> Batch:
        """Return the step's rows with some ids, over one of the caches."""
        return Batch(
            ids=ids,
            cache=cache,
            positions=self["positions"],
            slots=self["slots"],
            query_start=self["query_start"],
            seq_lens=self["seq_lens"],
            block_tables=self["tables"],
            max_query_len=self.sizes.max_query_len,
            max_seq_len=self.sizes.max_seq_len,
            padded=self.sizes.padded,
        )


def _views(buffer: _Array, sizes: Sizes) -> dict[str, _Array]:
    return {x.name: buffer[x.start : x.end].view(x.dtype).reshape(x.shape) for x in _layout(sizes)}
