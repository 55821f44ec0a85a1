"""What commands say of a comparison, and the tokenizer that turns its tokens into text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from . import render, suites
from .console import say

if TYPE_CHECKING:
    from .compare import Comparison


def report(
    name: str,
    what: str,
    comparison: Comparison,
    model: Path | None = None,
    *,
    decode_as: str = "",
) -> None:
    """Print whether two streams are equal, and where they first differ.

    model: the directory whose tokenizer spells the tokens; else that of the suite of the golden
    `decode_as`, or `name`.
    """
    say(render.verdict(name, what, comparison))
    if not comparison.equal:
        say(render.difference(comparison, decoder(decode_as or name, model)))


def decoder(name: str, model: Path | None = None) -> Callable[[list[int]], str]:
    """Return what turns token ids into text; without a tokenizer, into the ids in words."""
    suite = name.partition("/")[0]
    known = suites.SUITES
    folder = known[suite].model if model is None and suite in known else model
    if folder is None or not (folder / "tokenizer.json").exists():
        return lambda ids: " ".join(map(str, ids))
    from bitassay.reference.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
