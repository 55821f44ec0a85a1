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


@dataclass(frozen=True, eq=False)
class EngineDrafts:
    """What was drafted for one sequence in N rounds of K drafts, under D operations of the head.

    rounds: (t, drafted, accepted), where t is the generated token after which was drafted.
    draft_tokens: int32 [N, K], -1 beyond drafted. fingerprints: int64 [N, K, D], the row that
    chose each draft, zeros beyond drafted. first_pass: int64 [T, D], row t the first-pass row at
    position P + t - 1, zeros where none ran; its column draft.lm_head is 0, since only a round's
    base row has logits, and that is among `fingerprints`. prompt_fingerprints: int64 [D], the
    first-pass rows at positions 0 … P - 2, folded. D is in the order of
    `contract.draft_operations`.
    """

    rounds: list[tuple[int, int, int]]
    draft_tokens: Tensor
    fingerprints: Tensor
    first_pass: Tensor
    prompt_fingerprints: Tensor


@dataclass(frozen=True, eq=False)
class EngineTrace(Trace):
    """A trace with what was drafted on the way; drafts: None where the engine drafts nothing.

    Where the engine captures nothing, top_ids, top_bits, margins and fingerprints have no columns
    (sizes [T, 0], [T, 0], [0], [T, 0], [0]); tokens and rounds are there all the same.
    """

    drafts: EngineDrafts | None
