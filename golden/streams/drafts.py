"""DraftStream: what a draft head proposed after every token, how much of it was right, its bits.

What is drafted after a token depends on the tokens up to it alone, never on how many are drafted in
a round. So a golden holds the longest chains, after every token, and from it follows which of them
a run with K draft tokens a round meets: `run_of`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitassay.golden.errors import GoldenError
from bitassay.golden.streams.arrays import (
    Table,
    present,
    refuse,
    require_names,
    require_shapes,
    require_within,
)
from bitassay.golden.streams.draft_chains import accepted_of, drafted_cells, limits
from bitassay.reference.spec.contract import DRAFT_DEPTH
from bitassay.reference.spec.rounds import rounds

# As token_stream.ARRAYS; J drafts of a chain, D operations of the head.
DRAFT_ARRAYS: Table = {
    "draft_tokens": ("<i4", ("S", "T", "J")),
    "accepted": ("<i4", ("S", "T")),
    "draft_fingerprints": ("<u8", ("S", "T", "J", "D")),
    "draft_prompt_fingerprints": ("<u8", ("S", "D")),
}
DRAFT_LABELS = ("draft_operations",)
_STREAM = "draft stream"
_LM_HEAD = "draft.lm_head"  # the one operation of a head that runs only where drafts begin

Round = tuple[int, int, int]  # token, how many are drafted after it, how many of them accepted


@dataclass(frozen=True, eq=False)
class DraftStream:
    """The drafts of S streams of T tokens; raises GoldenError when the arrays do not fit.

    draft_tokens [S, T, 5] int32: what is drafted after token t, up to and including the first that
    the target does not choose, -1 from there on. accepted [S, T] int32: how many the target
    chooses. draft_fingerprints [S, T, 5, D] uint64: of the rows that chose them, one per operation.
    draft_prompt_fingerprints [S, D] uint64: the head's rows over the prompt, folded.

    rounds: None where all drafts are there, as in a golden. Of a run with so many drafts a round,
    the rounds of each stream; then everything that no round comes to is -1 or 0.

    None is what is absent: a golden has every array, another engine's run perhaps no fingerprints.
    draft_operations: those that there are fingerprints of, some of the head's or all.
    """

    draft_tokens: NDArray[np.int32]
    accepted: NDArray[np.int32]
    draft_fingerprints: NDArray[np.uint64] | None = None
    draft_prompt_fingerprints: NDArray[np.uint64] | None = None
    draft_operations: tuple[str, ...] | None = None
    rounds: tuple[tuple[Round, ...], ...] | None = None

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays that are there by name, in the order of DRAFT_ARRAYS."""
        return present(self, DRAFT_ARRAYS)

    @property
    def labels(self) -> dict[str, Any]:
        """What the arrays mean, by name; without what is not known."""
        return present(self, DRAFT_LABELS)

    def required(self, name: str) -> NDArray[Any]:
        """Return the array of that name; GoldenError when it is absent."""
        array: NDArray[Any] | None = getattr(self, name)
        if array is None:
            refuse(_STREAM, name, "the array", "none")
        return array

    def require_whole(self) -> None:
        """Raise GoldenError unless every array is there, as in a golden."""
        for name in DRAFT_ARRAYS:
            self.required(name)

    def require_fits(self, prompts: int, steps: int, vocab_size: int) -> None:
        """Raise GoldenError unless the arrays are of so many prompts and steps, and ids fit."""
        operations: tuple[str, ...] = ()
        if self.draft_fingerprints is not None or self.draft_prompt_fingerprints is not None:
            operations = require_names(_STREAM, "draft_operations", self.draft_operations)
        sizes = draft_sizes(prompts, steps, len(operations))
        require_shapes(_STREAM, self.arrays, DRAFT_ARRAYS, sizes)
        require_within(_STREAM, "draft_tokens", self.draft_tokens, -1, vocab_size - 1)
        require_within(_STREAM, "accepted", self.accepted, -1, DRAFT_DEPTH)
        if self.rounds is not None and len(self.rounds) != prompts:
            refuse(_STREAM, "rounds", f"those of {prompts} prompts", len(self.rounds))

    def require_recorded(self, tokens: NDArray[np.int32]) -> None:
        """Raise GoldenError unless accepted counts and chains follow from drafts and tokens."""
        if self.rounds is not None:
            refuse(_STREAM, "rounds", "all drafts after every token", "those of a run alone")
        right = accepted_of(self.draft_tokens, tokens)
        if (wrong := np.argwhere(right != self.accepted)).size:
            at = tuple(int(i) for i in wrong[0])
            expected = f"{right[at]}, as drafts and tokens say"
            refuse(_STREAM, f"accepted{list(at)}", expected, self.accepted[at])
        there = drafted_cells(right)
        if not np.array_equal(there, self.draft_tokens >= 0):
            at = tuple(int(i) for i in np.argwhere(there != (self.draft_tokens >= 0))[0])
            expected = "a draft" if there[at] else "-1, as there is nothing to draft"
            refuse(_STREAM, f"draft_tokens{list(at)}", expected, self.draft_tokens[at])
        if (blank := self.required("draft_fingerprints")[~there]).any():
            refuse(_STREAM, "draft_fingerprints", "0 where nothing was drafted", int(blank.max()))

    def first(self, count: int, steps: int) -> DraftStream:
        """Return the drafts of the first `count` streams, as if they had `steps` tokens."""
        if self.rounds is not None:
            raise GoldenError("only what has all drafts is cut, not those of a run")
        most = limits(steps)
        beyond = np.arange(DRAFT_DEPTH) >= most[:, None]
        tokens = self.draft_tokens[:count, :steps].copy()
        tokens[:, beyond] = -1
        fingerprints, folds = self.draft_fingerprints, self.draft_prompt_fingerprints
        if fingerprints is not None:
            fingerprints = fingerprints[:count, :steps].copy()
            fingerprints[:, beyond] = 0
        return replace(
            self,
            draft_tokens=tokens,
            accepted=np.minimum(self.accepted[:count, :steps], most.astype("<i4")),
            draft_fingerprints=fingerprints,
            draft_prompt_fingerprints=None if folds is None else folds[:count],
        )

    def take(self, chosen: list[int]) -> DraftStream:
        """Return the drafts of some streams, by number, in the order given."""
        cut: dict[str, Any] = {name: array[chosen] for name, array in self.arrays.items()}
        runs = None if self.rounds is None else tuple(self.rounds[s] for s in chosen)
        return replace(self, **cut, rounds=runs)

    def acceptance_length(self, num_draft_tokens: int) -> float:
        """Return how many tokens a round gives on average, with so many draft tokens."""
        runs = [rounds(own.tolist(), num_draft_tokens) for own in self.accepted]
        every = [accepted + 1 for run in runs for _, drafted, accepted in run if drafted]
        return sum(every) / len(every) if every else 1.0


def drafts_from_parts(parts: Mapping[str, Any]) -> DraftStream | None:
    """Return the stream whose arrays and labels are among these by name; None where none is.

    Raises GoldenError where there are some of them without draft_tokens and accepted.
    """
    names = (*DRAFT_ARRAYS, *DRAFT_LABELS)
    own = {name: parts[name] for name in names if parts.get(name) is not None}
    if not own:
        return None
    for name in ("draft_tokens", "accepted"):
        if name not in own:
            refuse(_STREAM, name, "the array", "none")
    return DraftStream(**own)


def draft_sizes(prompts: int, steps: int, operations: int) -> dict[str, int]:
    """Return the sizes of the dimensions of DRAFT_ARRAYS."""
    return {"S": prompts, "T": steps, "J": DRAFT_DEPTH, "D": operations}


def run_of(drafts: DraftStream, num_draft_tokens: int) -> DraftStream:
    """Return what of a golden's drafts a run with so many draft tokens a round comes to.

    The head's first pass gives a row for every token up to the last that a draft follows; the
    lm_head alone runs only where drafts begin.
    """
    prompts, steps = drafts.accepted.shape
    runs = tuple(tuple(rounds(own.tolist(), num_draft_tokens)) for own in drafts.accepted)
    tokens = np.full_like(drafts.draft_tokens, -1)
    accepted = np.full_like(drafts.accepted, -1)
    for s in range(prompts):
        for t, drafted, right in runs[s]:
            accepted[s, t] = right
            some = min(drafted, right + 1)
            tokens[s, t, :some] = drafts.draft_tokens[s, t, :some]
    fingerprints = drafts.draft_fingerprints
    if fingerprints is not None:
        kept = fingerprints_of_rounds(runs, steps, drafts.draft_operations or ())
        fingerprints = np.where(kept, fingerprints, np.uint64(0))
    return replace(
        drafts, draft_tokens=tokens, accepted=accepted, draft_fingerprints=fingerprints, rounds=runs
    )


def fingerprints_of_rounds(
    runs: Sequence[Sequence[Round]], steps: int, operations: Sequence[str]
) -> NDArray[np.bool_]:  # -> [S, T, 5, D]
    """Return which fingerprints of drafts the rounds of a run come to, by operations' names."""
    both = compared_fingerprints(runs, steps, 2)  # those of a row, and the lm_head's
    return both[..., [int(name == _LM_HEAD) for name in operations]]


def compared_fingerprints(
    runs: Sequence[Sequence[Round]], steps: int, operations: int
) -> NDArray[np.bool_]:  # -> [S, T, 5, D]
    """Return which fingerprints of drafts the rounds of a run come to; the last is the lm_head."""
    kept = np.zeros((len(runs), steps, DRAFT_DEPTH, operations), dtype=bool)
    for s, run in enumerate(runs):
        drafting = [t for t, drafted, _ in run if drafted]
        if drafting:
            kept[s, : drafting[-1] + 1, 0, :-1] = True
        for t, drafted, right in run:
            kept[s, t, : min(drafted, right + 1)] = True
    return kept
