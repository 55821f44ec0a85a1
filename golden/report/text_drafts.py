"""What is printed of a difference among drafts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.text import Text

from bitassay.golden.compare.diff import Difference
from bitassay.golden.streams.drafts import DraftStream
from bitassay.golden.streams.token_stream import TokenStream


def draft_difference(
    expected: TokenStream, found: TokenStream, d: Difference, decode: Callable[[list[int]], str]
) -> Iterator[Text]:
    """The drafts after a token and what became of them, on both sides."""
    assert d.step is not None
    after = expected.tokens[d.prompt, d.step : d.step + 1].tolist()
    yield Text(f"  after         token {after[0]} {decode(after)!r}")
    for label, stream in (("expected", expected), ("found", found)):
        drafts = _drafts(stream)
        ids = [int(i) for i in drafts.draft_tokens[d.prompt, d.step] if i >= 0]
        drafted = ", ".join(f"{token} {decode([token])!r}" for token in ids) or "nothing"
        yield Text(f"  {label:<13} drafted {drafted}; {_accepted(drafts, d.prompt, d.step)}")
    yield Text(f"  differing     {', '.join(d.arrays)}")
    yield from _rounds(expected, found, d)


def _accepted(drafts: DraftStream, prompt: int, step: int) -> str:
    count = int(drafts.accepted[prompt, step])
    return "no round begins there" if count < 0 else f"{count} accepted"


def _rounds(expected: TokenStream, found: TokenStream, d: Difference) -> Iterator[Text]:
    """The rounds of a run from the one that differs on, as (token, drafted, accepted)."""
    for label, stream in (("expected", expected), ("found", found)):
        rounds = _drafts(stream).rounds
        if rounds is None or d.step is None:
            return
        some = [entry for entry in rounds[d.prompt] if entry[0] >= d.step][:4]
        yield Text(f"  {label:<13} rounds {', '.join(map(str, some))} …")


def _drafts(stream: TokenStream) -> DraftStream:
    assert stream.drafts is not None
    return stream.drafts
