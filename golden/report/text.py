"""A comparison in words: its verdict, and where streams first differ."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bitassay.golden.compare.diff import Comparison, Counts, Difference
from bitassay.golden.report.decoding import Decode
from bitassay.golden.report.text_drafts import (
    all_operations,
    draft_difference,
    draft_operations,
    print_of,
)
from bitassay.golden.streams.token_stream import TOP, TokenStream

_LISTED = 10  # differing streams named one by one
_OPERATIONS = 4  # differing operations named one by one
_PROMPT_TAIL = 72  # characters of the prompt that are shown, the last ones


def counts(c: Counts) -> str:
    """Return counts in words."""
    text = (
        f"{c.streams:,} prompts, {c.tokens:,} tokens, {c.logits:,} logits, "
        f"{c.fingerprints:,} fingerprints"
    )
    if c.drafts is None:
        return text
    return f"{text}, {c.drafts:,} drafts, {c.acceptances:,} acceptance counts"


def verdict(name: str, what: str, comparison: Comparison) -> Text:
    """One line: equal or different, and how much was compared."""
    if comparison.equal:
        text = Text.assemble((f"{name}: equal", "bold green"), f" ({what}): ")
        return text.append(f"{counts(comparison.compared)}; 0 different")
    text = Text.assemble((f"{name}: different", "bold red"), f" ({what}): ")
    return text.append(
        f"{comparison.different.streams:,} of {comparison.compared.streams:,} streams differ; "
        f"different: {counts(comparison.different).split(', ', 1)[1]}; "
        f"compared: {counts(comparison.compared)}"
    )


def difference(comparison: Comparison, decode: Decode) -> Group:
    """The first difference in full, then where each of the other streams first differs."""
    first, *others = comparison.differences
    parts: list[RenderableType] = list(_first(comparison, first, decode))
    for other in others[: _LISTED - 1]:
        parts.append(Text(f"  also {_where(comparison.expected, other)}"))
    if len(others) >= _LISTED:
        parts.append(Text(f"  and {len(others) - _LISTED + 1} more streams"))
    return Group(*parts)


def _first(c: Comparison, d: Difference, decode: Decode) -> Iterator[RenderableType]:
    expected, found = c.expected, c.found
    yield Text(f"  {_where(expected, d)}")
    yield Text(f"  prompt text   {_tail(decode(expected.prompt(d.prompt)))}")
    yield from _fingerprints(expected, found, d)
    if d.step is None:
        return
    at = (d.prompt, d.step)
    if d.draft is not None or d.arrays == ("accepted",):
        yield from draft_difference(expected, found, d, decode)
        return
    said = decode(expected.tokens[d.prompt, : d.step].tolist())
    yield Text(f"  so far        {_tail(said)}")
    for label, stream in (("expected", expected), ("found", found)):
        token = int(stream.tokens[at])
        yield Text(
            f"  {label:<13} token {token} {decode([token])!r}, logit {_bits(stream, at, 0)}, "
            f"margin {int(stream.margins[at])} ulps"
        )
    yield Text(f"  differing     {', '.join(d.arrays)}")
    yield _ranks(expected, found, at, decode)


def _fingerprints(expected: TokenStream, found: TokenStream, d: Difference) -> Iterator[Text]:
    """The first differing operations, and how many there are before and after them."""
    if not d.operations:
        return
    every = all_operations(expected) if d.draft is None else draft_operations(expected)
    first = every.index(d.operations[0])
    if first:
        yield Text(f"  equal before  {first} of {len(every)} operations, up to {every[first - 1]}")
    for operation in d.operations[:_OPERATIONS]:
        want, got = (print_of(stream, d, operation) for stream in (expected, found))
        yield Text(f"  fingerprint   {operation}: expected {want:#018x}, found {got:#018x}")
    if len(d.operations) > _OPERATIONS:
        yield Text(f"  different too {len(d.operations) - _OPERATIONS} more operations after these")


def _ranks(expected: TokenStream, found: TokenStream, at: tuple[int, int], decode: Decode) -> Table:
    table = Table("rank", "expected", "bits", "found", "bits", "", box=None, padding=(0, 2))
    for rank in range(TOP):
        cells = []
        for stream in (expected, found):
            token = int(stream.top_ids[(*at, rank)])
            cells += [Text(f"{token} {decode([token])!r}"), Text(_bits(stream, at, rank))]
        differs = cells[0] != cells[2] or cells[1] != cells[3]
        table.add_row(str(rank + 1), *cells, "differs" if differs else "")
    return table


def _where(stream: TokenStream, d: Difference) -> str:
    """Prompt, token, and the first differing operation; tokens count from 0, as steps do."""
    step = "prompt rows" if d.step is None else f"token {d.step}"
    place = f"{stream.prompt_names[d.prompt]}, {step}"
    place += "" if d.draft is None else f", draft {d.draft}"
    if d.arrays == ("accepted",):
        return f"{place}: the count of accepted drafts differs"
    if not d.operations:
        return f"{place}: no operation differs, only {', '.join(d.arrays)}"
    first, *others = d.operations
    then = f", then {', '.join(others[:2])}" if others else ""
    more = f" and {len(others) - 2} more" if len(others) > 2 else ""
    return f"{place}: {first} differs (first in running order){then}{more}"


def _bits(stream: TokenStream, at: tuple[int, int], rank: int) -> str:
    return f"0x{int(stream.top_bits[(*at, rank)]):0{stream.logit_width // 4}x}"


def _tail(text: str) -> str:
    return repr(text if len(text) <= _PROMPT_TAIL else "…" + text[-_PROMPT_TAIL:])
