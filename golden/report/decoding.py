"""What turns token ids into text: the tokenizer of a suite or of a user's own model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bitassay.golden import suites

Decode = Callable[[list[int]], str]


def decoder(name: str, model: Path | None = None) -> Decode:
    """Return what turns token ids into text; without a tokenizer, into the ids in words."""
    suite = name.partition("/")[0]
    known = suites.SUITES
    folder = known[suite].model if model is None and suite in known else model
    if folder is None or not (folder / "tokenizer.json").exists():
        return lambda ids: " ".join(map(str, ids))
    from bitassay.reference.checkpoints.checkpoint import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
