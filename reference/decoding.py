"""What greedy decoding asks of any model: fit ids, and what a row of logits chooses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitassay.reference.floats import bits
from bitassay.reference.sample import greedy, margin_ulps, top_k
from bitassay.reference.trace import TOP

Ids = Sequence[int] | Tensor


def check_ids(
    sequences: Sequence[Ids] | Tensor, vocab_size: int, what: str = "prompt"
) -> list[Tensor]:
    """Return sequences of token ids as int64 tensors.

    Raises ValueError naming the sequence (`what` and its number) that is empty, is not made of
    integers, or holds an id outside the vocabulary.
    """
    checked = []
    for index, sequence in enumerate(sequences):
        ids = torch.as_tensor(sequence)
        if ids.dim() != 1 or len(ids) == 0:
            raise ValueError(
                f"{what} {index}: expected at least one token id, found shape {list(ids.shape)}"
            )
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"{what} {index}: expected integer ids, found {ids.dtype}")
        outside = (ids < 0) | (ids >= vocab_size)
        if outside.any():
            at = int(outside.nonzero()[0])
            raise ValueError(
                f"{what} {index}, position {at}: expected an id within 0 … {vocab_size - 1} "
                f"(vocabulary of {vocab_size}), found {int(ids[at])}: encode it with this model's "
                "tokenizer"
            )
        checked.append(ids.long())
    return checked


def choose(  # [R, V] -> [R], [R, 8], [R, 8], [R]
    logits: Tensor, rows: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens, top ids, top bits and margins of rows of logits, in a `Trace`'s dtypes.

    rows: (prompt, step) of each row, for the ValueError that a NaN raises.
    """
    refuse_nan(logits, rows)
    values, ids = top_k(logits, TOP)
    width = 8 * values.element_size()
    return (
        greedy(logits).int(),
        ids.int(),
        bits(values).long() & (1 << width) - 1,
        margin_ulps(logits),
    )


def refuse_nan(logits: Tensor, rows: Sequence[tuple[int, int]], what: str = "logits") -> None:
    """Raise ValueError naming the (prompt, step) of the first row that holds NaN, and the id."""
    nan = logits.isnan()
    if nan.any():
        row, token = nan.nonzero()[0].tolist()
        prompt, step = rows[row]
        raise ValueError(
            f"prompt {prompt}, step {step}: expected numbers among the {what}, found NaN, "
            f"first at id {token}: the weights are too large to be decoded"
        )
