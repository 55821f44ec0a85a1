"""DraftStream: what a draft head proposed after every token, how much of it was right, its bits.

What is drafted after a token depends on the tokens up to it alone, never on how many are drafted in
a round. So a golden holds the longest chains, after every token, and from it follows which of them
a run with K draft tokens a round meets: `run_of`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitassay.golden.errors import GoldenError
from bitassay.reference.spec.contract import DRAFT_DEPTH
from bitassay.reference.spec.rounds import rounds

# name -> dtype and dimensions, as in stream.ARRAYS; J drafts of a chain, D operations of the head.
DRAFT_ARRAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "draft_tokens": ("<i4", ("S", "T", "J")),
    "accepted": ("<i4", ("S", "T")),
    "draft_fingerprints": ("<u8", ("S", "T", "J", "D")),
    "draft_prompt_fingerprints": ("<u8", ("S", "D")),
}
DRAFT_LABELS = ("draft_operations",)

Round = tuple[int, int, int]  # token, how many are drafted after it, how many of them accepted


@dataclass(frozen=True, eq=False)
class DraftStream:
    """The drafts of S streams of T tokens; raises GoldenError when the arrays do not fit.

    draft_tokens [S, T, 5] int32: what is drafted after token t, up to and including the first that
    the target does not choose, -1 from there on. accepted [S, T] int32: how many the target
    chooses. draft_fingerprints [S, T, 5, D] uint64: of the rows that chose them, one per operation.
    draft_prompt_fingerprints [S, D] uint64: the head's rows over the prompt, folded.

    rounds: None where all drafts are there, as in a golden. Of a run with so many drafts a round,
    the rounds of each stream; then everything that no round came to is -1 or 0.
    """

    draft_tokens: NDArray[np.int32]
    accepted: NDArray[np.int32]
    draft_fingerprints: NDArray[np.uint64]
    draft_prompt_fingerprints: NDArray[np.uint64]
    draft_operations: tuple[str, ...]
    rounds: tuple[tuple[Round, ...], ...] | None = None

    @property
    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays by name, in the order of DRAFT_ARRAYS."""
        return {name: getattr(self, name) for name in DRAFT_ARRAYS}

    def require_fits(self, prompts: int, steps: int, vocab_size: int) -> None:
        """Raise GoldenError unless the arrays are of so many prompts and steps, and ids fit."""
        sizes = draft_sizes(prompts, steps, len(self.draft_operations))
        for name, array in self.arrays.items():
            dtype, dims = DRAFT_ARRAYS[name]
            shape = tuple(sizes[d] for d in dims)
            if array.dtype != np.dtype(dtype) or array.shape != shape:
                found = f"{array.dtype} {list(array.shape)}"
                _refuse(name, f"{np.dtype(dtype)} {list(shape)}", found)
        for name, most in (("draft_tokens", vocab_size - 1), ("accepted", DRAFT_DEPTH)):
            values = getattr(self, name)
            outside = (values < -1) | (values > most)
            if outside.any():
                at = [int(i) for i in np.argwhere(outside)[0]]
                _refuse(f"{name}{at}", f"-1 … {most}", values[tuple(at)])
        if self.rounds is not None and len(self.rounds) != prompts:
            _refuse("rounds", f"those of {prompts} prompts", len(self.rounds))

    def require_recorded(self, tokens: NDArray[np.int32]) -> None:
        """Raise GoldenError unless accepted counts and chains are what drafts and tokens say."""
        if self.rounds is not None:
            _refuse("rounds", "all drafts after every token", "those of a run alone")
        right = accepted_of(self.draft_tokens, tokens)
        if (wrong := np.argwhere(right != self.accepted)).size:
            at = tuple(int(i) for i in wrong[0])
            expected = f"{right[at]}, as drafts and tokens say"
            _refuse(f"accepted{list(at)}", expected, self.accepted[at])
        there = _cells(right, limits(tokens.shape[1]))
        if not np.array_equal(there, self.draft_tokens >= 0):
            at = tuple(int(i) for i in np.argwhere(there != (self.draft_tokens >= 0))[0])
            expected = "a draft" if there[at] else "-1, as there is nothing to draft"
            _refuse(f"draft_tokens{list(at)}", expected, self.draft_tokens[at])
        if (blank := self.draft_fingerprints[~there]).any():
            _refuse("draft_fingerprints", "0 where nothing was drafted", int(blank.max()))

    def first(self, count: int, steps: int) -> DraftStream:
        """Return the drafts of the first `count` streams, as if they had `steps` tokens."""
        if self.rounds is not None:
            raise GoldenError("only what has all drafts is cut, not those of a run")
        most = limits(steps)
        tokens = self.draft_tokens[:count, :steps].copy()
        prints = self.draft_fingerprints[:count, :steps].copy()
        beyond = np.arange(DRAFT_DEPTH) >= most[:, None]
        tokens[:, beyond], prints[:, beyond] = -1, 0
        return replace(
            self,
            draft_tokens=tokens,
            accepted=np.minimum(self.accepted[:count, :steps], most.astype("<i4")),
            draft_fingerprints=prints,
            draft_prompt_fingerprints=self.draft_prompt_fingerprints[:count],
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


def draft_sizes(prompts: int, steps: int, operations: int) -> dict[str, int]:
    """Return the sizes of the dimensions of DRAFT_ARRAYS."""
    return {"S": prompts, "T": steps, "J": DRAFT_DEPTH, "D": operations}


def limits(steps: int) -> NDArray[np.int64]:  # -> [T]
    """Return how many tokens may be drafted after each: the bonus token is never drafted."""
    return np.clip(steps - 2 - np.arange(steps), 0, DRAFT_DEPTH)


def accepted_of(draft_tokens: NDArray[np.int32], tokens: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return how many drafts are the tokens that follow: [S, T, 5], [S, T] -> [S, T]."""
    steps = tokens.shape[1]
    after = np.arange(steps)[:, None] + 1 + np.arange(DRAFT_DEPTH)
    within = np.arange(DRAFT_DEPTH) < limits(steps)[:, None]
    same = (draft_tokens == tokens[:, np.minimum(after, steps - 1)]) & within
    counts: NDArray[np.int32] = np.logical_and.accumulate(same, axis=2).sum(axis=2).astype("<i4")
    return counts


def run_of(drafts: DraftStream, num_draft_tokens: int) -> DraftStream:
    """Return what of a golden's drafts a run with so many draft tokens a round comes to.

    The head's first pass gives a row for every token up to the last that a draft follows; the
    lm_head alone runs only where drafts begin.
    """
    prompts, steps = drafts.accepted.shape
    runs = tuple(tuple(rounds(own.tolist(), num_draft_tokens)) for own in drafts.accepted)
    tokens = np.full_like(drafts.draft_tokens, -1)
    accepted = np.full_like(drafts.accepted, -1)
    kept = compared_fingerprints(runs, steps, len(drafts.draft_operations))
    for s in range(prompts):
        for t, drafted, right in runs[s]:
            accepted[s, t] = right
            some = min(drafted, right + 1)
            tokens[s, t, :some] = drafts.draft_tokens[s, t, :some]
    prints = np.where(kept, drafts.draft_fingerprints, np.uint64(0))
    return replace(
        drafts, draft_tokens=tokens, accepted=accepted, draft_fingerprints=prints, rounds=runs
    )


def compared_fingerprints(
    runs: Sequence[Sequence[Round]], steps: int, operations: int
) -> NDArray[np.bool_]:  # -> [S, T, 5, D]
    """Return which fingerprints of drafts the rounds of a run come to."""
    kept = np.zeros((len(runs), steps, DRAFT_DEPTH, operations), dtype=bool)
    for s, run in enumerate(runs):
        drafting = [t for t, drafted, _ in run if drafted]
        if drafting:
            kept[s, : drafting[-1] + 1, 0, :-1] = True
        for t, drafted, right in run:
            kept[s, t, : min(drafted, right + 1)] = True
    return kept


def _cells(accepted: NDArray[np.int32], most: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where something is drafted: the accepted ones and the first that is not, as [S, T, 5]."""
    some = np.minimum(accepted + 1, most)
    cells: NDArray[np.bool_] = np.arange(DRAFT_DEPTH) < some[:, :, None]
    return cells


def _refuse(name: str, expected: object, found: object) -> None:
    raise GoldenError(f"draft stream, {name}: expected {expected}, found {found}")
