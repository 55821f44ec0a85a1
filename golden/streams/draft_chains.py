"""Chains of drafts: how long they may be, and how much of one the target chooses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from bitassay.reference.spec.contract import DRAFT_DEPTH


def limits(steps: int) -> NDArray[np.int64]:  # -> [T]
    """Return how many tokens may be drafted after each: the bonus token is never drafted."""
    return np.clip(steps - 2 - np.arange(steps), 0, DRAFT_DEPTH)


def accepted_of(draft_tokens: NDArray[np.int32], tokens: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return how many drafts are the tokens that follow: [S, T, 5], [S, T] -> [S, T]."""
    steps = tokens.shape[1]
    after = np.arange(steps)[:, None] + 1 + np.arange(DRAFT_DEPTH)
    within = np.arange(DRAFT_DEPTH) < limits(steps)[:, None]
    same = (draft_tokens == tokens[:, np.minimum(after, steps - 1)]) & within
    counts: NDArray[np.int32] = np.logical_and.accumulate(same, axis=2).sum(axis=2).astype("<i4")
    return counts


def drafted_cells(accepted: NDArray[np.int32]) -> NDArray[np.bool_]:  # [S, T] -> [S, T, 5]
    """Return where something is drafted: the accepted ones and the first that is not."""
    some = np.minimum(accepted + 1, limits(accepted.shape[1]))
    cells: NDArray[np.bool_] = np.arange(DRAFT_DEPTH) < some[:, :, None]
    return cells
