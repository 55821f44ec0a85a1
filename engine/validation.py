"""What decoding asks of its arguments before anything runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import numpy as np

Prompts = Sequence[Sequence[int]]


def check_integer(name: str, value: Any) -> None:
    """Raise ValueError unless a value is an integer, of whatever type; no bool is one."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name}: expected an integer, found {value!r}")


def check_ids(sequences: Prompts, vocab_size: int, what: str, *, first: int = 0) -> list[list[int]]:
    """Return sequences of ids as lists.

    Raises ValueError naming the sequence (`what` and its number, counted from `first`) that is
    empty, is not made of integers, or holds an id outside the vocabulary.
    """
    checked = []
    for index, sequence in enumerate(sequences, first):
        ids = np.asarray(sequence)
        if ids.ndim != 1 or len(ids) == 0:
            raise ValueError(
                f"{what} {index}: expected at least one token id, found shape {list(ids.shape)}"
            )
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"{what} {index}: expected integer ids, found {ids.dtype}")
        outside = np.flatnonzero((ids < 0) | (ids >= vocab_size))
        if len(outside):
            at = int(outside[0])
            raise ValueError(
                f"{what} {index}, position {at}: expected an id within 0 … {vocab_size - 1} "
                f"(vocabulary of {vocab_size}), found {int(ids[at])}: encode it with this model's "
                "tokenizer"
            )
        checked.append(ids.tolist())
    return checked


def check_lengths(
    prompts: Sequence[int],
    tokens: Sequence[int],
    positions: int,
    what: str = "prompt",
    *,
    first: int = 0,
) -> None:
    """Raise ValueError naming the first prompt that takes more positions than the model has."""
    for index, (prompt, count) in enumerate(zip(prompts, tokens, strict=True), first):
        taken = prompt + count - 1  # the last token is never fed
        if taken > positions:
            raise ValueError(
                f"{what} {index}: expected at most {positions} positions "
                f"(max_position_embeddings), found {taken}: {prompt} tokens continued by {count}, "
                "the last of which is not fed: shorten the prompt or ask for fewer tokens"
            )


def check_max_tokens(tokens: Sequence[int], what: str, *, first: int = 0) -> None:
    """Raise ValueError naming the first prompt that is not to be continued by whole tokens."""
    for index, count in enumerate(tokens, first):
        check_integer(f"{what} {index}, max_tokens", count)
        if count < 1:
            raise ValueError(f"{what} {index}: expected max_tokens of at least 1, found {count}")


def check_eos(eos: int | Sequence[int] | None, vocab_size: int, what: str) -> tuple[int, ...]:
    """Return the ids that end a request, none for None.

    Raises ValueError for an empty sequence, and for what is no id of the vocabulary.
    """
    if eos is None:
        return ()
    ids = tuple(eos) if isinstance(eos, Iterable) else (eos,)
    if not ids:
        raise ValueError(f"{what}: expected ids in eos_token_id, found none: leave it out")
    for token in ids:
        check_integer(f"{what}, eos_token_id", token)
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"{what}, eos_token_id: expected an id within 0 … {vocab_size - 1} (vocabulary of "
                f"{vocab_size}), found {token}"
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
