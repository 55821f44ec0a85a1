"""What was compared and what was not, in words."""

from __future__ import annotations

from bitassay.golden.compare.common import Absent
from bitassay.golden.compare.counts import Counts
from bitassay.golden.compare.diff import Comparison

_OPERATIONS = 4  # operations named one by one
# Arrays that are named by one word where all of those that there are were not compared.
_GROUPS = {
    "logits": ("top_ids", "top_bits", "margins"),
    "fingerprints": ("fingerprints", "prompt_fingerprints"),
    "drafts": ("drafts",),
    "fingerprints of drafts": ("draft_fingerprints", "draft_prompt_fingerprints"),
}
_WORDS = {
    "top_ids": "ids of the top logits",
    "top_bits": "bits of the top logits",
    "margins": "margins",
    "fingerprints": "fingerprints of generated rows",
    "prompt_fingerprints": "fingerprints of prompt rows",
    "draft_fingerprints": "fingerprints of drafted rows",
    "draft_prompt_fingerprints": "fingerprints of the draft head's prompt rows",
}


def counts(c: Counts) -> str:
    """Return counts in words, without those of kinds that were not compared."""
    numbers = {
        "prompts": c.streams,
        "tokens": c.tokens,
        "logits": c.logits,
        "ids of top logits": c.top_ids,
        "margins": c.margins,
        "fingerprints": c.fingerprints,
        "drafts": c.drafts,
        "acceptance counts": c.acceptances,
    }
    return ", ".join(f"{number:,} {what}" for what, number in numbers.items() if number is not None)


def not_compared(comparison: Comparison) -> str:
    """Return what was not compared in words, as the end of a line; empty where all was."""
    absent = {one.array: one for one in comparison.common.absent}
    expected = comparison.expected.arrays.keys() | {"drafts"}
    words: list[str] = []
    for group, arrays in _GROUPS.items():
        lacking = [absent[name] for name in arrays if name in absent]
        alike = len({one.operations for one in lacking}) == 1
        if alike and len(lacking) == len(expected.intersection(arrays)):
            words.append(_worded(group, lacking[0]))
        else:
            words += [_worded(_WORDS[one.array], one) for one in lacking]
    return f", not compared: {', '.join(words)}" if words else ""


def _worded(what: str, absent: Absent) -> str:
    """An array or several, and the operations that are lacking if not all are."""
    operations = absent.operations
    if not operations:
        return what
    named = ", ".join(operations[:_OPERATIONS])
    more = len(operations) - _OPERATIONS
    return f"{what} of {named}" + (f" and {more} more" if more > 0 else "")
