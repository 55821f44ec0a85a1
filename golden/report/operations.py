"""The operations that a difference may be in, and the fingerprints of the one that it is in."""

from __future__ import annotations

from bitassay.golden.compare.common import Common
from bitassay.golden.compare.diff import Difference
from bitassay.golden.streams.token_stream import TokenStream


def compared_operations(common: Common, d: Difference) -> tuple[str, ...]:
    """Return the operations whose fingerprints were compared for rows like those that differ.

    In running order, target before draft head; empty where no such fingerprints were compared.
    """
    stream, drafts = common.expected, common.expected.drafts
    head: tuple[str, ...] = ()
    if drafts is not None:
        folded = d.step is None and d.draft is None
        array = drafts.draft_prompt_fingerprints if folded else drafts.draft_fingerprints
        head = () if array is None else drafts.draft_operations or ()
    if d.draft is not None:
        return head
    if d.step is not None and stream.fingerprints is None:
        return ()
    own = None if d.step is None and stream.prompt_fingerprints is None else stream.operations
    return (own or ()) + head


def fingerprint_of(stream: TokenStream, d: Difference, operation: str) -> int:
    """Return the fingerprint of an operation's row, or of the prompt's rows, that differs.

    Raises GoldenError where the stream has none for such rows.
    """
    if operation in (stream.operations or ()):
        o = (stream.operations or ()).index(operation)
        if d.step is None:
            return int(stream.required("prompt_fingerprints")[d.prompt, o])
        return int(stream.required("fingerprints")[d.prompt, d.step, o])
    drafts = stream.drafts
    assert drafts is not None
    o = (drafts.draft_operations or ()).index(operation)
    if d.step is None or d.draft is None:
        return int(drafts.required("draft_prompt_fingerprints")[d.prompt, o])
    return int(drafts.required("draft_fingerprints")[d.prompt, d.step, d.draft, o])
