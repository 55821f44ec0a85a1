"""Prompts: a file of them, one JSON object a line, and their token ids."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitassay.golden.digests import sha256
from bitassay.golden.errors import PromptError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


_LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # json.loads joins the pairs


@dataclass(frozen=True)
class Prompt:
    """One prompt: `id` names it, `token_ids` is None where `text` is still to be encoded."""

    id: str
    text: str | None
    token_ids: tuple[int, ...] | None = None


def load_prompts(path: Path) -> tuple[list[Prompt], str]:
    """Return the prompts of a file and the sha256 of the file.

    Each line is {"id": …, "text": …} or {"id": …, "token_ids": […]}; other keys are for people.
    A key stands once, and text is UTF-8. Raises PromptError naming the line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise PromptError(f"prompts {path} cannot be read: {error.strerror}") from None
    # Lines end at "\n" alone: str.splitlines would also cut at U+2028, which text may hold.
    lines = enumerate(data.split(b"\n"), 1)
    prompts = [_parse(line, f"{path} line {n}") for n, line in lines if line.strip()]
    if not prompts:
        raise PromptError(f"{path} holds no prompts")
    names = [prompt.id for prompt in prompts]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise PromptError(f"{path}: id {min(repeated)!r} stands there more than once")
    return prompts, sha256(data)


def encode_prompts(
    prompts: list[Prompt], tokenizer: Tokenizer | None, vocab_size: int
) -> list[list[int]]:
    """Return the token ids of each prompt; PromptError for none or for one the model lacks.

    tokenizer: None where every prompt comes as ids.
    """
    encoded = []
    for prompt in prompts:
        ids = prompt.token_ids
        if ids is None:
            assert tokenizer is not None
            ids = tuple(tokenizer.encode(prompt.text, add_special_tokens=False).ids)
        if not ids:
            raise PromptError(f"prompt {prompt.id!r} has no tokens: at least one is needed")
        for position, i in enumerate(ids):
            if not 0 <= i < vocab_size:
                raise PromptError(
                    f"prompt {prompt.id!r}, position {position}: token id {i}, but the model's "
                    f"vocabulary has ids 0 to {vocab_size - 1}"
                )
        encoded.append(list(ids))
    return encoded


def _parse(data: bytes, where: str) -> Prompt:
    try:
        line = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{where} is not UTF-8 ({error.reason} at byte {error.start}): save the file as UTF-8"
        ) from None
    try:
        record: Any = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("id"), str):
        raise PromptError(f'{where}: expected an object with a text "id", found {line[:60]!r}')
    text, ids = record.get("text"), record.get("token_ids")
    if text is not None and ids is not None:
        raise PromptError(f'{where}: expected "text" or "token_ids", found both: leave one out')
    for key in ("id", "text"):
        if isinstance(record.get(key), str) and _LONE_SURROGATE.search(record[key]):
            raise PromptError(f"{where}: {key} holds half a surrogate pair, which is no character")
    whole = isinstance(ids, list) and all(type(i) is int for i in ids)
    if not (isinstance(text, str) if ids is None else whole):
        raise PromptError(f'{where}: expected "text" or a list "token_ids", found {line[:60]!r}')
    return Prompt(record["id"], text, None if ids is None else tuple(ids))


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError when a key stands there twice, for only one could be meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [key for key, _ in pairs]
        repeated = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"key {repeated!r} stands there more than once")
    return found
