"""What greedy decoding asks of any model: fit ids, and what a row of logits chooses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bitassay.reference.floats import bits
from bitassay.reference.sample import greedy, margin_ulps, top_k
from bitassay.reference.spec.errors import SequenceError
from bitassay.reference.trace import TOP

Ids = Sequence[int] | Tensor


def check_ids(
    prompts: Sequence[Ids] | Tensor, vocab_size: int, part: str | None = None
) -> list[Tensor]:
    """Return the token ids of prompts, or those of a part of each, as int64 tensors.

    part: what the ids are, where they are not the prompt's own ("recorded tokens"). Raises
    SequenceError as `check_sequence`, with the prompt's number and the part.
    """
    checked = []
    for index, ids in enumerate(prompts):
        try:
            checked.append(check_sequence(ids, vocab_size))
        except SequenceError as error:
            raise error.located(prompt=index, part=part) from None
    return checked


def check_sequence(sequence: Ids, vocab_size: int) -> Tensor:  # -> [T]
    """Return one sequence of token ids as an int64 tensor.

    Raises SequenceError when it is empty, is not made of integers, or holds an id outside the
    vocabulary, with the position of the first.
    """
    ids = torch.as_tensor(sequence)
    if ids.dim() != 1 or len(ids) == 0:
        raise SequenceError(f"expected at least one token id, found shape {list(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise SequenceError(f"expected integer ids, found {ids.dtype}")
    outside = (ids < 0) | (ids >= vocab_size)
    if outside.any():
        at = int(outside.nonzero()[0])
        raise SequenceError(
            f"expected an id within 0 … {vocab_size - 1} (vocabulary of {vocab_size}), found "
            f"{int(ids[at])}: encode it with this model's tokenizer",
            position=at,
        )
    return ids.long()


def choose(  # [R, V] -> [R], [R, 8], [R, 8], [R]
    logits: Tensor, rows: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens, top ids, top bits and margins of rows of logits, in a `Trace`'s dtypes.

    rows: (prompt, step) of each row, for the SequenceError that a NaN raises.
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
    """Raise SequenceError with the (prompt, step) of the first row that holds NaN, and the id."""
    nan = logits.isnan()
    if nan.any():
        row, token = nan.nonzero()[0].tolist()
        prompt, step = rows[row]
        raise SequenceError(
            f"expected numbers among the {what}, found NaN, first at id {token}: the weights are "
            "too large to be decoded",
            prompt=prompt,
            step=step,
        )
