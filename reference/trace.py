"""What one greedily decoded sequence leaves behind, in exact bits."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

TOP = 8  # how many of the highest logits of each step are kept


@dataclass(frozen=True, eq=False)
class Trace:
    """One sequence of T generated tokens under O fingerprinted operations.

    tokens: int32 [T]. top_ids: int32 [T, 8], by value descending, then id ascending. top_bits:
    int64 [T, 8], the stored bits of those logits, zero-extended. margins: int64 [T], first minus
    second logit in ulps of the logits' dtype. fingerprints: int64 [T, O], the rows that chose a
    token; prompt_fingerprints: int64 [O], the rows before them, folded; both hold the bits of a
    uint64. O is in the order of `contract.operations`.
    """

    tokens: Tensor
    top_ids: Tensor
    top_bits: Tensor
    margins: Tensor
    fingerprints: Tensor
    prompt_fingerprints: Tensor

    def same_bits(self, other: Trace) -> bool:
        """Whether every value of the two is equal."""
        return all(
            torch.equal(getattr(self, field.name), getattr(other, field.name))
            for field in fields(self)
        )


@dataclass(frozen=True, eq=False)
class Drafts:
    """What a draft head says beside T generated tokens of a sequence, under D operations.

    tokens: int32 [T, DRAFT_DEPTH], drafted after token t: at most T - 2 - t of them, up to and
    including the first that the target does not choose; -1 from there on. accepted: int32 [T], how
    many leading ones the target chooses. fingerprints: int64 [T, DRAFT_DEPTH, D], the row that
    chose the draft in that cell, 0 where there is none. prompt_fingerprints: int64 [D], the
    first-pass rows at positions 0 … P - 2, folded; the lm_head runs on none of them. D is in the
    order of `contract.draft_operations`; fingerprints hold the bits of a uint64.
    """

    tokens: Tensor
    accepted: Tensor
    fingerprints: Tensor
    prompt_fingerprints: Tensor

    def same_bits(self, other: Drafts) -> bool:
        """Whether every value of the two is equal."""
        return all(
            torch.equal(getattr(self, field.name), getattr(other, field.name))
            for field in fields(self)
        )


@dataclass(frozen=True, eq=False)
class EagleTrace(Trace):
    """The trace of a target's sequence, and what its draft head says along it.

    Where rounds of K drafts were run, and not the whole stream replayed, `drafts` has what they
    computed: accepted is -1 where no round began; tokens and fingerprints are those of the rounds,
    all drafts of a round, and the first-pass row of every token up to the last round that drafted,
    its lm_head being 0 where it drafted nothing.
    """

    drafts: Drafts

    def same_bits(self, other: Trace) -> bool:
        """Whether every value of the two is equal, drafts included."""
        return (
            isinstance(other, EagleTrace)
            and self.target.same_bits(other.target)
            and self.drafts.same_bits(other.drafts)
        )

    @property
    def target(self) -> Trace:
        """The part that the target alone decides: what plain greedy decoding leaves behind."""
        return Trace(**{field.name: getattr(self, field.name) for field in fields(Trace)})
