"""What two streams both have, so that only that is compared, and what the found one lacks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from bitassay.golden.streams.arrays import Table
from bitassay.golden.streams.drafts import DRAFT_ARRAYS, DraftStream
from bitassay.golden.streams.token_stream import ARRAYS, TokenStream


@dataclass(frozen=True)
class Absent:
    """An array of the expected stream that the found one lacks, wholly or for some operations.

    array: its name, or "drafts" for all arrays of the drafts. operations: those whose fingerprints
    are lacking, in running order; empty where the whole array is.
    """

    array: str
    operations: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.array} of {', '.join(self.operations)}" if self.operations else self.array


@dataclass(frozen=True)
class Common:
    """Two streams cut down to the arrays and operations of both, and what that left out.

    absent: in the order of the expected stream's arrays. What only the found stream has is left
    out too, and not listed.
    """

    expected: TokenStream
    found: TokenStream
    absent: tuple[Absent, ...]


def in_common(expected: TokenStream, found: TokenStream) -> Common:
    """Return what both streams have; the operations found must be some of those expected."""
    want, got, absent = _cut(expected, found, ARRAYS, "operations")
    if expected.drafts is None or found.drafts is None:
        if expected.drafts is not None:
            absent.append(Absent("drafts"))
        want["drafts"] = got["drafts"] = None
    else:
        drafts = _cut(expected.drafts, found.drafts, DRAFT_ARRAYS, "draft_operations")
        want["drafts"] = replace(expected.drafts, **drafts[0])
        got["drafts"] = replace(found.drafts, **drafts[1])
        absent += drafts[2]
    return Common(replace(expected, **want), replace(found, **got), tuple(absent))


_Stream = TokenStream | DraftStream


def _cut(
    expected: _Stream, found: _Stream, table: Table, label: str
) -> tuple[dict[str, Any], dict[str, Any], list[Absent]]:
    """What to replace in either stream so that both have the same arrays, and what is absent.

    label: the attribute that names the operations of fingerprints, a dimension of their arrays.
    """
    every, some = getattr(expected, label) or (), getattr(found, label) or ()
    columns = [every.index(name) for name in some if name in every]
    lacking = tuple(name for name in every if name not in some)
    want: dict[str, Any] = {}
    got: dict[str, Any] = {}
    absent: list[Absent] = []
    for name in table:
        array = getattr(expected, name)
        if array is None or getattr(found, name) is None:
            want[name] = got[name] = None
            absent += [] if array is None else [Absent(name)]
        elif lacking and name.endswith("fingerprints"):
            want[name] = array[..., columns]
            absent.append(Absent(name, lacking))
    if lacking:
        want[label] = some
    return want, got, absent
