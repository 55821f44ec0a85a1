"""What one step of the engine is told, and what it answers: plain numbers on the host."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rows:
    """One sequence's part of a step.

    request: its number. table: its blocks, enough for every position that the step writes, the
    drafts' lookahead included. first: the position of the first row. ids: what is fed; the last
    `drafts` of them are drafts to verify. chooses: whether the rows from len(ids) - 1 - drafts on
    choose tokens; a chunk of a prompt before its last does not. next_id: the id after the last row
    where it is known, None where the rows' own choices are it. limit: the last position that may
    ever be fed; a draft's row beyond it is not stored.
    """

    request: int
    table: list[int]
    first: int
    ids: list[int]
    drafts: int
    chooses: bool
    next_id: int | None
    limit: int


@dataclass(frozen=True)
class Result:
    """What a sequence that chooses got in a step.

    tokens: the accepted drafts and the target's choice after them. accepted: how many drafts the
    target chose as well. drafts: what to verify next, empty without a head. handle, row: where the
    choices and the drafts' fingerprints of this sequence lie on the device, for
    `step.outputs.collect`; None where nothing is captured.
    """

    request: int
    tokens: list[int]
    accepted: int
    drafts: list[int]
    handle: object = field(default=None, repr=False, compare=False)
    row: int = 0
