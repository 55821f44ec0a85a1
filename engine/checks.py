"""What decoding asks of its arguments before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .blocks import blocks_for

Prompts = Sequence[Sequence[int]]


def check_ids(sequences: Prompts, vocab_size: int, what: str, *, first: int = 0) -> list[list[int]]:
    """Return sequences of ids as lists.

    Raises ValueError naming the sequence (`what` and its number, counted from `first`) that is
    empty, is not made of integers, or holds an id outside the vocabulary.
    """
    checked = []
    for index, sequence in enumerate(sequences, first):
        ids = torch.as_tensor(sequence)
        if ids.dim() != 1 or len(ids) == 0:
            raise ValueError(
                f"{what} {index}: expected at least one token id, found shape {list(ids.shape)}"
            )
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise ValueError(f"{what} {index}: expected integer ids, found {ids.dtype}")
        outside = ((ids < 0) | (ids >= vocab_size)).nonzero()
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


def check_blocks(
    prompts: Sequence[int], tokens: Sequence[int], num_blocks: int, what: str, *, first: int = 0
) -> None:
    """Raise ValueError naming the first prompt that the whole cache could not hold."""
    for index, (prompt, count) in enumerate(zip(prompts, tokens, strict=True), first):
        needed = blocks_for(prompt + count - 1)
        if needed > num_blocks:
            raise ValueError(
                f"{what} {index}: expected at most {num_blocks} blocks, all of the cache, found "
                f"{needed}: {prompt} tokens continued by {count}: shorten it, or make the cache "
                "larger (num_blocks)"
            )


def check_max_tokens(tokens: Sequence[int], what: str, *, first: int = 0) -> None:
    """Raise ValueError naming the first prompt that is to be continued by no token."""
    for index, count in enumerate(tokens, first):
        if count < 1:
            raise ValueError(f"{what} {index}: expected max_tokens of at least 1, found {count}")


def check_order(order: Sequence[int], count: int) -> None:
    """Raise ValueError unless order is a permutation of so many prompts."""
    if sorted(order) != list(range(count)):
        raise ValueError(f"order: expected each of 0 … {count - 1} once, found {list(order)}")


def each(name: str, value: int | Sequence[int], count: int) -> list[int]:
    """Return one value for each prompt; ValueError for a sequence of another length."""
    values = [value] * count if isinstance(value, int) else list(value)
    if len(values) != count:
        raise ValueError(f"{name}: expected one for each of {count} prompts, found {len(values)}")
    return values
