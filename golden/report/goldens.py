"""Goldens in words: a store's list, what is known of one, its streams as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from bitassay.golden.report.decoding import Decode
from bitassay.golden.storage.manifest import Entry
from bitassay.golden.storage.store import Golden
from bitassay.golden.streams.token_stream import TokenStream

_OPERATIONS = 4  # named one by one, of the first and of the last ones


def listing(entries: dict[str, Entry]) -> Table:
    """One row a golden."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for header in ("golden", "prompts", "tokens", "distinct", "contract", "bytes", "confirmed"):
        table.add_column(header, no_wrap=header != "confirmed")
    for e in entries.values():
        contract = f"{e.contract_version} {e.contract[:8]}"
        numbers = (f"{e.prompts:,}", f"{e.tokens:,}", f"{e.distinct_rows:,}")
        table.add_row(e.name, *numbers, contract, f"{e.bytes:,}", confirmed(e))
    return table


def confirmed(entry: Entry) -> str:
    """How far hardware has confirmed a golden."""
    return "; ".join(f"{c.gpu}, driver {c.driver}" for c in entry.confirmed) or "emulated"


def facts(golden: Golden) -> Table:
    """All that is known of a golden, one fact a row."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    provenance, stream = golden.provenance, golden.stream
    margins = stream.required("margins")
    rows = asdict(provenance.identity) | {
        "content digest": golden.entry.digest,
        "schema": provenance.schema,
        "recorded": provenance.date,
        "commit": f"{provenance.commit}{' with changes' if provenance.dirty else ''}",
        "packages": ", ".join(f"{k} {v}" for k, v in provenance.packages.items()),
        "confirmed": confirmed(golden.entry),
        "operations": _operations(stream.operations or ()),
        "prompts × steps": f"{len(stream.prompt_names)} × {stream.steps}",
        "distinct rows": f"{stream.distinct_rows:,} of {stream.tokens.size:,}",
        **_drafting(stream),
        "smallest margin": f"{int(margins.min())} ulps of {stream.logits_dtype}; "
        f"{int((margins == 0).sum())} ties",
    }
    for key, value in rows.items():
        table.add_row(key.replace("_", " "), Text(str(value)))
    return table


def _drafting(stream: TokenStream) -> dict[str, str]:
    """What there is of drafts, and how many tokens a round of 1, 3 and 5 of them gives."""
    if stream.drafts is None:
        return {}
    lengths = [f"{stream.drafts.acceptance_length(k):.2f} at K = {k}" for k in (1, 3, 5)]
    return {
        "draft operations": _operations(stream.drafts.draft_operations or ()),
        "drafts": f"{int((stream.drafts.draft_tokens >= 0).sum()):,}",
        "acceptance length": f"{', '.join(lengths)} tokens a round",
    }


def _operations(names: tuple[str, ...]) -> str:
    if len(names) <= 2 * _OPERATIONS:
        return ", ".join(names)
    some = (*names[:_OPERATIONS], "…", *names[-_OPERATIONS:])
    return f"{len(names)}: {', '.join(some)}"


def streams(golden: Golden, chosen: list[int], decode: Decode) -> Iterator[Text]:
    """The prompts and what was generated after each, as text."""
    stream = golden.stream
    for s in chosen:
        yield Text(f"\n── {stream.prompt_names[s]}", style="bold")
        prompt, tokens = stream.prompt(s), stream.tokens[s].tolist()
        text, whole = decode(prompt), decode(prompt + tokens)
        # What stands between the two, a blank between ids, belongs to neither alone.
        continuation = whole.removeprefix(text) if whole.startswith(text) else decode(tokens)
        yield Text(text, style="dim").append(Text(continuation, style="not dim green"))
