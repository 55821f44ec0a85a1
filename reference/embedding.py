"""Embedding: one row of the table per token, copied."""

from __future__ import annotations

from torch import Tensor


def embedding(ids: Tensor, weight: Tensor) -> Tensor:  # [T], [V, H] -> [T, H]
    """Return weight[ids]; no arithmetic, so no rounding.

    ids: integers [T]. weight: [V, H], any dtype. Raises ValueError naming the first position whose
    id is outside 0 … V-1.
    """
    outside = (ids < 0) | (ids >= weight.shape[0])
    if outside.any():
        at = int(outside.nonzero()[0])
        raise ValueError(
            f"token id {int(ids[at])} at position {at}: the vocabulary has ids 0 to "
            f"{weight.shape[0] - 1}"
        )
    return weight.index_select(0, ids)
