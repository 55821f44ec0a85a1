"""What commands print of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from bitassay.cli.console import say

if TYPE_CHECKING:
    from bitassay.golden.compare.diff import Comparison


def say_comparison(
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
    from bitassay.golden.report.decoding import decoder
    from bitassay.golden.report.text import difference, verdict

    say(verdict(name, what, comparison))
    if not comparison.equal:
        say(difference(comparison, decoder(decode_as or name, model)))
