"""Batches for one forward pass, laid out by hand: rows of any sequences behind what is cached."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bitassay.engine.models.batch import Batch
from bitassay.engine.models.causal_lm import CausalLM
from bitassay.engine.models.kv_cache import PagedCache
from bitassay.engine.scheduling.blocks import blocks_for
from bitassay.engine.scheduling.step_plan import Rows
from bitassay.engine.step.inputs import Inputs


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


def tables_of(lengths: Sequence[int]) -> list[list[int]]:
    """Return blocks for sequences of so many positions, none of them in order, as in a server."""
    free = list(range(sum(map(blocks_for, lengths))))
    return [[free.pop() for _ in range(blocks_for(length))] for length in lengths]


def make_batch(
    model: CausalLM,
    segments: Sequence[Segment],
    ids: Sequence[int] | torch.Tensor,  # [T], of the segments' rows
    *,
    cache: PagedCache | None = None,
    tables: Sequence[list[int]] | None = None,
) -> Batch:
    """Return the batch of one segment a sequence.

    tables: each sequence's blocks, enough for its end; None for blocks of their own, in a cache of
    their own unless one is given.
    """
    tables = tables_of([s.end for s in segments]) if tables is None else tables
    if cache is None:
        cache = model.new_cache(1 + max(block for table in tables for block in table))
    given = list(map(int, ids))
    step, row = [], 0
    for segment, table in zip(segments, tables, strict=True):
        fed = given[row : row + segment.count]
        row += segment.count
        step.append(
            Rows(segment.sequence, table, segment.first, fed, 0, False, None, segment.end - 1)
        )
    inputs = Inputs.upload(step, 0, model.device)
    return inputs.batch(inputs["ids"], cache)
