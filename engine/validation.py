"""What decoding asks of its arguments before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from bitassay.engine.config import check_integer
from bitassay.reference.spec.errors import SequenceError

Prompts = Sequence[Sequence[int]]
What = Literal["prompt", "request"]  # what a sequence is to whoever gave it


def check_ids(
    sequences: Prompts, vocab_size: int, what: What, *, first: int = 0
) -> list[list[int]]:
    """Return sequences of ids as lists.

    Raises ValueError naming the sequence (`what` and its number, counted from `first`) that is
    empty, is not made of integers, or holds an id outside the vocabulary.
    """
    checked = []
    for index, sequence in enumerate(sequences, first):
        ids = np.asarray(sequence)
        if ids.ndim != 1 or len(ids) == 0:
            raise _unfit(
                what, index, f"expected at least one token id, found shape {list(ids.shape)}"
            )
        if not np.issubdtype(ids.dtype, np.integer):
            raise _unfit(what, index, f"expected integer ids, found {ids.dtype}")
        outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if len(outside):
            at = int(outside[0])
            raise _unfit(
                what,
                index,
                f"expected an id within 0 … {vocab_size - 1} (vocabulary of {vocab_size}), found "
                f"{int(ids[at])}: encode it with this model's tokenizer",
                position=at,
            )
        checked.append(ids.tolist())
    return checked


def check_lengths(
    prompts: Sequence[int],
    tokens: Sequence[int],
    positions: int,
    what: What = "prompt",
    *,
    first: int = 0,
) -> None:
    """Raise ValueError naming the first prompt that takes more positions than the model has."""
    for index, (prompt, count) in enumerate(zip(prompts, tokens, strict=True), first):
        taken = prompt + count - 1  # the last token is never fed
        if taken > positions:
            raise _unfit(
                what,
                index,
                f"expected at most {positions} positions (max_position_embeddings), found {taken}: "
                f"{prompt} tokens continued by {count}, the last of which is not fed: shorten the "
                "prompt or ask for fewer tokens",
            )


def check_max_tokens(tokens: Sequence[int], what: What, *, first: int = 0) -> None:
    """Raise ValueError naming the first prompt that is not to be continued by whole tokens."""
    for index, count in enumerate(tokens, first):
        _require_integer(what, index, "max_tokens", count)
        if count < 1:
            raise _unfit(what, index, f"expected max_tokens of at least 1, found {count}")


def check_eos(
    eos: int | Sequence[int] | None, vocab_size: int, what: What, index: int
) -> tuple[int, ...]:
    """Return the ids that end a request, none for None.

    Raises ValueError for an empty sequence, and for what is no id of the vocabulary.
    """
    if eos is None:
        return ()
    ids = tuple(eos) if isinstance(eos, Iterable) else (eos,)
    if not ids:
        raise _unfit(what, index, "expected ids in eos_token_id, found none: leave it out")
    for token in ids:
        _require_integer(what, index, "eos_token_id", token)
        if not 0 <= token < vocab_size:
            raise _unfit(
                what,
                index,
                f"expected an id within 0 … {vocab_size - 1} (vocabulary of {vocab_size}), found "
                f"{token}",
                field="eos_token_id",
            )
    return tuple(int(token) for token in ids)


def check_order(order: Sequence[int], count: int) -> None:
    """Raise ValueError unless order is a permutation of so many prompts."""
    if sorted(order) != list(range(count)):
        raise ValueError(f"order: expected each of 0 … {count - 1} once, found {list(order)}")


def each(name: str, value: int | Sequence[int], count: int) -> list[int]:
    """Return one integer for each prompt; ValueError for another number of them, or none."""
    values = list(value) if isinstance(value, Iterable) else [value] * count
    if len(values) != count:
        raise ValueError(f"{name}: expected one for each of {count} prompts, found {len(values)}")
    for one in values:
        check_integer(name, one)
    return [int(one) for one in values]


def _require_integer(what: What, index: int, field: str, value: Any) -> None:
    try:
        check_integer(field, value)
    except ValueError:
        raise _unfit(what, index, f"expected an integer, found {value!r}", field=field) from None


def _unfit(what: What, index: int, problem: str, **where: Any) -> SequenceError:
    where[what] = index
    return SequenceError(problem, **where)
