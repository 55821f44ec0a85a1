"""A comparison in words: its verdict, and where streams first differ."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bitassay.golden.compare.diff import Comparison, Difference
from bitassay.golden.report.decoding import Decode
from bitassay.golden.report.operations import compared_operations, fingerprint_of
from bitassay.golden.report.text_counts import counts, not_compared
from bitassay.golden.report.text_drafts import draft_difference
from bitassay.golden.streams.token_stream import TOP, TokenStream

_LISTED = 10  # differing streams named one by one
_OPERATIONS = 4  # differing operations named one by one
_PROMPT_TAIL = 72  # characters of the prompt that are shown, the last ones


def verdict(name: str, what: str, comparison: Comparison) -> Text:
    """One line: equal or different, how much was compared, and what was not."""
    if comparison.equal:
        text = Text.assemble((f"{name}: equal", "bold green"), f" ({what}): ")
        text.append(f"{counts(comparison.compared)}; 0 different")
    else:
        text = Text.assemble((f"{name}: different", "bold red"), f" ({what}): ")
        text.append(
            f"{comparison.different.streams:,} of {comparison.compared.streams:,} streams differ; "
            f"different: {counts(comparison.different).split(', ', 1)[1]}; "
            f"compared: {counts(comparison.compared)}"
        )
    return text.append(not_compared(comparison))


def difference(comparison: Comparison, decode: Decode) -> Group:
    """The first difference in full, then where each of the other streams first differs."""
    first, *others = comparison.differences
    parts: list[RenderableType] = list(_first(comparison, first, decode))
    for other in others[: _LISTED - 1]:
        parts.append(Text(f"  also {_where(comparison, other)}"))
    if len(others) >= _LISTED:
        parts.append(Text(f"  and {len(others) - _LISTED + 1} more streams"))
    return Group(*parts)


def _first(c: Comparison, d: Difference, decode: Decode) -> Iterator[RenderableType]:
    expected, found = c.expected, c.found
    yield Text(f"  {_where(c, d)}")
    yield Text(f"  prompt text   {_tail(decode(expected.prompt(d.prompt)))}")
    yield from _fingerprints(c, d)
    if d.step is None:
        return
    at = (d.prompt, d.step)
    if d.draft is not None or d.arrays == ("accepted",):
        yield from draft_difference(expected, found, d, decode)
        return
    generated = decode(expected.tokens[d.prompt, : d.step].tolist())
    yield Text(f"  so far        {_tail(generated)}")
    for label, stream in (("expected", expected), ("found", found)):
        yield Text(f"  {label:<13} {_choice(stream, at, decode)}")
    yield Text(f"  differing     {', '.join(d.arrays)}")
    if c.common.expected.top_ids is not None or c.common.expected.top_bits is not None:
        yield _ranks(c, at, decode)


def _fingerprints(c: Comparison, d: Difference) -> Iterator[Text]:
    """The first differing operations, and how many there are before and after them."""
    if not d.operations:
        return
    every = compared_operations(c.common, d)
    first = every.index(d.operations[0])
    if first:
        yield Text(f"  equal before  {first} of {len(every)} operations, up to {every[first - 1]}")
    for operation in d.operations[:_OPERATIONS]:
        want, got = (fingerprint_of(stream, d, operation) for stream in (c.expected, c.found))
        yield Text(f"  fingerprint   {operation}: expected {want:#018x}, found {got:#018x}")
    if len(d.operations) > _OPERATIONS:
        yield Text(f"  different too {len(d.operations) - _OPERATIONS} more operations after these")


def _choice(stream: TokenStream, at: tuple[int, int], decode: Decode) -> str:
    """The token that was chosen, and of its logit and margin what the stream has."""
    token = int(stream.tokens[at])
    logit = "" if stream.top_bits is None else f", logit {_bits(stream, at, 0)}"
    margin = "" if stream.margins is None else f", margin {int(stream.margins[at])} ulps"
    return f"token {token} {decode([token])!r}{logit}{margin}"


def _ranks(c: Comparison, at: tuple[int, int], decode: Decode) -> Table:
    """The highest logits of both sides; what a stream lacks is blank and differs from nothing."""
    table = Table("rank", "expected", "bits", "found", "bits", "", box=None, padding=(0, 2))
    for rank in range(TOP):
        cells: list[Text] = []
        for stream in (c.expected, c.found):
            token = "" if stream.top_ids is None else _spelled(stream.top_ids[(*at, rank)], decode)
            cells += [Text(token), Text(_bits(stream, at, rank))]
        pairs = ((cells[0], cells[2]), (cells[1], cells[3]))
        differs = any(want != got for want, got in pairs if want.plain and got.plain)
        table.add_row(str(rank + 1), *cells, "differs" if differs else "")
    return table


def _where(c: Comparison, d: Difference) -> str:
    """Prompt, token, and the first differing operation; tokens count from 0, as steps do."""
    step = "prompt rows" if d.step is None else f"token {d.step}"
    place = f"{c.expected.prompt_names[d.prompt]}, {step}"
    place += "" if d.draft is None else f", draft {d.draft}"
    if d.arrays == ("accepted",):
        return f"{place}: the count of accepted drafts differs"
    arrays = ", ".join(d.arrays)
    operations = compared_operations(c.common, d)
    if not operations:
        rows = "" if c.compared.fingerprints is None else " of such rows"
        lacking = f"no fingerprints{rows} were given, so no operation can be named"
        return f"{place}: {arrays} differ; {lacking}"
    partly = any(one.array == "drafts" or "fingerprints" in one.array for one in c.common.absent)
    if not d.operations:
        none = f"none of the {len(operations)} operations compared" if partly else "no operation"
        return f"{place}: {none} differs, only {arrays}"
    first, *others = d.operations
    then = f", then {', '.join(others[:2])}" if others else ""
    more = f" and {len(others) - 2} more" if len(others) > 2 else ""
    order = "first in running order of those compared" if partly else "first in running order"
    return f"{place}: {first} differs ({order}){then}{more}"


def _spelled(token: int, decode: Decode) -> str:
    return f"{int(token)} {decode([int(token)])!r}"


def _bits(stream: TokenStream, at: tuple[int, int], rank: int) -> str:
    """The bits of one of the highest logits in hexadecimal, empty where the stream has none."""
    if stream.top_bits is None:
        return ""
    return f"0x{int(stream.top_bits[(*at, rank)]):0{stream.logit_width // 4}x}"


def _tail(text: str) -> str:
    return repr(text if len(text) <= _PROMPT_TAIL else "…" + text[-_PROMPT_TAIL:])
