"""What of two streams' drafts is compared, what differs, and what of that comes first in a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bitassay.golden.streams.drafts import DraftStream, fingerprints_of_rounds

Mask = NDArray[np.bool_]
# In a step of a run: the target chooses, what was drafted is accepted, and drafts begin there.
CHOOSING, ACCEPTING, DRAFTING = range(3)


@dataclass(frozen=True, eq=False)
class DraftMasks:
    """Some of a DraftStream's values: one mask for each array, None where it is not compared.

    tokens [S, T, 5], accepted [S, T], fingerprints [S, T, 5, D], folds [S, D].
    """

    tokens: Mask
    accepted: Mask
    fingerprints: Mask | None
    folds: Mask | None


@dataclass(frozen=True)
class FirstDraft:
    """The first difference among the drafts of a prompt; fields as those of compare.Difference.

    order: step and part of it, by which it comes before or after a difference of the target.
    """

    order: tuple[int, int]
    step: int
    operations: tuple[str, ...]
    arrays: tuple[str, ...]
    draft: int | None


def compared(expected: DraftStream) -> DraftMasks:
    """Return what is compared: of a run, what its rounds come to."""
    tokens, accepted = _there(expected.draft_tokens), _there(expected.accepted)
    fingerprints = folds = None
    if expected.draft_fingerprints is not None:
        fingerprints = np.broadcast_to(tokens[..., None], expected.draft_fingerprints.shape)
        if expected.rounds is not None:
            operations = expected.draft_operations or ()
            fingerprints = fingerprints_of_rounds(expected.rounds, accepted.shape[1], operations)
    if expected.draft_prompt_fingerprints is not None:
        folds = np.ones(expected.draft_prompt_fingerprints.shape, dtype=bool)
        if expected.rounds is not None:
            # The head of a run that drafts nothing may rest.
            folds &= tokens.reshape(len(tokens), -1).any(axis=1, keepdims=True)
    return DraftMasks(tokens, accepted, fingerprints, folds)


def differing(expected: DraftStream, found: DraftStream) -> DraftMasks:
    """Return what differs of that, between two streams that have the same arrays.

    A chain ends where the target chooses another token, so where the counts of accepted drafts
    differ, chains that end elsewhere are no difference of their own.
    """
    tokens: Mask = expected.draft_tokens != found.draft_tokens
    fingerprints = _unequal(expected.draft_fingerprints, found.draft_fingerprints)
    folds = _unequal(expected.draft_prompt_fingerprints, found.draft_prompt_fingerprints)
    if expected.rounds is None or found.rounds is None:
        counts: Mask = expected.accepted != found.accepted
        ends = (expected.draft_tokens >= 0) != (found.draft_tokens >= 0)
        ends &= counts[:, :, None]
        return DraftMasks(tokens & ~ends, counts, _and(fingerprints, ~ends[..., None]), folds)
    run = compared(expected)
    accepted = np.zeros_like(run.accepted)
    for s, (want, got) in enumerate(zip(expected.rounds, found.rounds, strict=True)):
        lacking = [t for t, *rest in want if (t, *rest) not in got]
        if want != got:
            accepted[s, lacking or [want[0][0] if want else 0]] = True
    fingerprints = _and(fingerprints, run.fingerprints)
    return DraftMasks(tokens & run.tokens, accepted, fingerprints, _and(folds, run.folds))


def first_of_prompt(
    expected: DraftStream, found: DraftStream, different: DraftMasks, s: int
) -> FirstDraft | None:
    """Return the first difference of prompt s among its drafts, if there is one."""
    firsts = (_drafted(expected, different, s), _accepted(expected, found, different, s))
    return min((x for x in firsts if x), key=lambda x: x.order, default=None)


def _there(array: NDArray[np.int32]) -> Mask:
    there: Mask = np.greater_equal(array, 0)
    return there


def _unequal(expected: NDArray[np.uint64] | None, found: NDArray[np.uint64] | None) -> Mask | None:
    return None if expected is None or found is None else np.not_equal(expected, found)


def _and(mask: Mask | None, other: Mask | None) -> Mask | None:
    return None if mask is None or other is None else mask & other


def _drafted(expected: DraftStream, different: DraftMasks, s: int) -> FirstDraft | None:
    either = different.tokens[s].copy()
    if different.fingerprints is not None:
        either |= different.fingerprints[s].any(axis=2)
    if not either.any():
        return None
    step, draft = (int(i) for i in np.argwhere(either)[0])
    operations: tuple[str, ...] = ()
    if different.fingerprints is not None:
        rows = np.flatnonzero(different.fingerprints[s, step, draft])
        operations = tuple((expected.draft_operations or ())[o] for o in rows)
    arrays = ["draft_tokens"] if different.tokens[s, step, draft] else []
    arrays += ["draft_fingerprints"] if operations else []
    return FirstDraft((step, DRAFTING), step, operations, tuple(arrays), draft)


def _accepted(
    expected: DraftStream, found: DraftStream, different: DraftMasks, s: int
) -> FirstDraft | None:
    """A count is known when the target has chosen what follows the last accepted draft."""
    steps = np.flatnonzero(different.accepted[s])
    if not steps.size:
        return None
    step = int(steps[0])
    counts = [int(stream.accepted[s, step]) for stream in (expected, found)]
    drafted = [_drafted_at(stream, s, step) for stream in (expected, found)]
    when = step + 1 + max(0, min(counts)) if drafted[0] == drafted[1] else step
    return FirstDraft((when, ACCEPTING), step, (), ("accepted",), None)


def _drafted_at(stream: DraftStream, s: int, step: int) -> int | None:
    """How many drafts the round at a step has; None where all drafts are there, or no round."""
    return {t: drafted for t, drafted, _ in stream.rounds[s]}.get(step) if stream.rounds else None
