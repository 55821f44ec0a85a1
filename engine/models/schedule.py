"""Which rows run in which step: decided by lengths alone, so before anything has run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from bitassay.engine.models.batch import Segment


def schedule(
    prompts: Sequence[int],
    max_tokens: int,
    *,
    batch_size: int,
    order: Sequence[int],
    chunk_size: int | None = None,
) -> Iterator[list[Segment]]:
    """Yield the segments of every step until each prompt has max_tokens tokens.

    prompts: their lengths. batch_size: sequences in flight; when one ends, the next of `order`
    takes its place, so rows of prompts and of decoding mix. chunk_size: prompt tokens that a
    sequence feeds a step, None for all.
    """
    waiting = iter(order)
    running = [(sequence, 0) for sequence in islice(waiting, batch_size)]
    while running:
        step, left = [], []
        for sequence, first in running:
            rest = prompts[sequence] - first
            count = min(rest, chunk_size or rest) if rest > 0 else 1
            step.append(Segment(sequence, first, count))
            # The last token is never fed.
            if first + count < prompts[sequence] + max_tokens - 1:
                left.append((sequence, first + count))
            else:
                left += [(another, 0) for another in islice(waiting, 1)]
        yield step
        running = left
