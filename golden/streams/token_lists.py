"""Lists of token ids, as any engine has them: checked, with messages that name the prompt."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

from bitassay.golden.errors import GoldenError


def prompt_lists(
    prompts: Iterable[Iterable[int]], names: Sequence[str] | None, vocab_size: int
) -> tuple[list[list[int]], tuple[str, ...]]:
    """Return the prompts' ids and names, "prompt 0" and so on where none are given.

    Raises GoldenError where there is no prompt, a prompt is empty, an id is none of the model's, or
    there are more or fewer names than prompts.
    """
    rows = list(prompts)
    names = tuple(f"prompt {s}" for s in range(len(rows))) if names is None else tuple(names)
    if not rows or len(names) != len(rows):
        raise GoldenError(
            f"prompts: expected one or more, and a name for each, found {len(rows)} prompts and "
            f"{len(names)} names"
        )
    found = [
        _ids(row, f"prompt {name!r}", vocab_size) for row, name in zip(rows, names, strict=True)
    ]
    if empty := [name for name, row in zip(names, found, strict=True) if not row]:
        raise GoldenError(f"prompt {empty[0]!r}: expected one token id or more, found none")
    return found, names


def token_lists(
    tokens: Iterable[Iterable[int]], names: tuple[str, ...], vocab_size: int
) -> list[list[int]]:
    """Return the ids generated after each prompt, equally many for all.

    Raises GoldenError where they are of more or fewer prompts than there are names, an id is none
    of the model's, or a prompt has another number of them than the first.
    """
    rows = list(tokens)
    if len(rows) != len(names):
        raise GoldenError(
            f"tokens: expected those of {len(names)} prompts, found those of {len(rows)}"
        )
    what = [f"tokens of {name!r}" for name in names]
    found = [_ids(row, own, vocab_size) for row, own in zip(rows, what, strict=True)]
    steps = len(found[0])
    if not steps:
        raise GoldenError(f"{what[0]}: expected one token id or more, found none")
    for row, own in zip(found, what, strict=True):
        if len(row) != steps:
            raise GoldenError(
                f"{own}: expected {steps}, as many as of {names[0]!r}, found {len(row)}: every "
                "prompt is continued by equally many tokens, so generate past the end of sequence, "
                f"or take the first {min(map(len, found))} of each and of the golden "
                "(TokenStream.first)"
            )
    return found


def _ids(row: Iterable[int], what: str, vocab_size: int) -> list[int]:
    try:
        ids = [operator.index(i) for i in row]
    except TypeError:
        raise GoldenError(f"{what}: expected a list of integers, found {row!r:.80}") from None
    if outside := [i for i in ids if not 0 <= i < vocab_size]:
        raise GoldenError(f"{what}: expected ids within 0 … {vocab_size - 1}, found {outside[0]}")
    return ids
