"""What the engine hands back for one sequence: exact bits, on the CPU."""

from __future__ import annotations

from dataclasses import dataclass

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
