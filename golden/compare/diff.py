"""Compares two streams bit by bit and finds where each prompt's first difference is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bitassay.golden.compare.diff_drafts import (
    CHOOSING,
    Cells,
    compared,
    differing,
    first_of_prompt,
)
from bitassay.golden.errors import GoldenError
from bitassay.golden.streams.token_stream import TokenStream

_BY_STEP = ("tokens", "top_ids", "top_bits", "margins", "fingerprints")


@dataclass(frozen=True)
class Counts:
    """How many values there are, or how many of them differ.

    drafts: drafted tokens. acceptances: counts of accepted drafts. None where nothing is drafted.
    """

    streams: int
    tokens: int
    logits: int
    fingerprints: int
    drafts: int | None = None
    acceptances: int | None = None


@dataclass(frozen=True)
class Difference:
    """Where one prompt's stream first differs.

    prompt: its index. step: None when the prompt's own rows differ. operations: those whose rows
    differ there, by fingerprint, in running order; none when all rows are equal, and so the
    choice among the logits differs, or how many drafts were accepted. arrays: those that differ at
    this step. draft: which of the tokens drafted after this one, counted from 0; None where it is
    the target that differs, or the count of accepted drafts.
    """

    prompt: int
    step: int | None
    operations: tuple[str, ...]
    arrays: tuple[str, ...]
    draft: int | None = None


@dataclass(frozen=True)
class Comparison:
    """What was compared, what of it differs, and the first difference of each differing stream."""

    expected: TokenStream
    found: TokenStream
    compared: Counts
    different: Counts
    differences: tuple[Difference, ...]

    @property
    def equal(self) -> bool:
        """Whether every bit is equal."""
        return not self.differences


def compare(expected: TokenStream, found: TokenStream) -> Comparison:
    """Compare two streams of the same prompts; GoldenError when they cannot be compared.

    Where the expected drafts are those of a run (drafts.run_of), what the run came to is compared
    and nothing else: an engine drafts beyond the first mismatch, and a golden does not.
    """
    for name in ("prompt_ids", "prompt_offsets"):
        if not np.array_equal(getattr(expected, name), getattr(found, name)):
            raise GoldenError("the two streams continue different prompts")
    for name in ("steps", "operations", "logits_dtype", "vocab_size"):
        if (a := getattr(expected, name)) != (b := getattr(found, name)):
            raise GoldenError(f"the two streams differ in {name}: expected {a}, found {b}")
    cells = _differing_drafts(expected, found)
    first = [_first(expected, found, cells, s) for s in range(len(expected.prompt_names))]
    differences = tuple(difference for difference in first if difference)
    return Comparison(
        expected,
        found,
        compared=_compared(expected),
        different=_different(expected, found, cells, len(differences)),
        differences=differences,
    )


def _differing_drafts(expected: TokenStream, found: TokenStream) -> Cells | None:
    """What differs among the drafts; None where there are none to compare."""
    want, got = expected.drafts, found.drafts
    if want is None and got is None:
        return None
    if want is None or got is None:
        told = ["no drafts" if drafts is None else "drafts" for drafts in (want, got)]
        raise GoldenError(f"the two streams differ in drafts: expected {told[0]}, found {told[1]}")
    if want.draft_operations != got.draft_operations:
        raise GoldenError(
            f"the two streams differ in draft_operations: expected {want.draft_operations}, found "
            f"{got.draft_operations}"
        )
    if (want.rounds is None) != (got.rounds is None):
        raise GoldenError("the drafts of a run are compared with those of a run alone")
    return differing(want, got)


def _first(
    expected: TokenStream, found: TokenStream, cells: Cells | None, s: int
) -> Difference | None:
    own = _first_of_target(expected, found, s)
    if expected.drafts is None or found.drafts is None or cells is None:
        return own
    folded = np.flatnonzero(cells.folds[s])
    if folded.size:
        operations = tuple(expected.drafts.draft_operations[o] for o in folded)
        if own is None or own.step is not None:
            return Difference(s, None, operations, ("draft_prompt_fingerprints",))
        arrays = (*own.arrays, "draft_prompt_fingerprints")
        return Difference(s, None, (*own.operations, *operations), arrays)
    drafted = first_of_prompt(expected.drafts, found.drafts, cells, s)
    if drafted is None or (own and (own.step is None or (own.step, CHOOSING) < drafted.order)):
        return own
    return Difference(s, drafted.step, drafted.operations, drafted.arrays, drafted.draft)


def _first_of_target(expected: TokenStream, found: TokenStream, s: int) -> Difference | None:
    folded = np.flatnonzero(expected.prompt_fingerprints[s] != found.prompt_fingerprints[s])
    if folded.size:
        operations = tuple(expected.operations[o] for o in folded)
        return Difference(s, None, operations, ("prompt_fingerprints",))
    unequal = {
        name: (getattr(expected, name)[s] != getattr(found, name)[s]).reshape(expected.steps, -1)
        for name in _BY_STEP
    }
    steps = np.flatnonzero(np.logical_or.reduce([x.any(axis=1) for x in unequal.values()]))
    if not steps.size:
        return None
    step = int(steps[0])
    rows = np.flatnonzero(unequal["fingerprints"][step])
    operations = tuple(expected.operations[o] for o in rows)
    arrays = tuple(name for name in _BY_STEP if unequal[name][step].any())
    return Difference(s, step, operations, arrays)


def _compared(stream: TokenStream) -> Counts:
    counts = Counts(
        streams=len(stream.prompt_names),
        tokens=stream.tokens.size,
        logits=stream.top_bits.size,
        fingerprints=stream.fingerprints.size + stream.prompt_fingerprints.size,
    )
    return _with_drafts(counts, compared(stream.drafts)) if stream.drafts else counts


def _different(
    expected: TokenStream, found: TokenStream, cells: Cells | None, streams: int
) -> Counts:
    logits = (expected.top_bits != found.top_bits) | (expected.top_ids != found.top_ids)
    fingerprints = (expected.fingerprints != found.fingerprints).sum()
    folded = (expected.prompt_fingerprints != found.prompt_fingerprints).sum()
    counts = Counts(
        streams=streams,
        tokens=int((expected.tokens != found.tokens).sum()),
        logits=int(logits.sum()),
        fingerprints=int(fingerprints + folded),
    )
    return _with_drafts(counts, cells) if cells else counts


def _with_drafts(counts: Counts, cells: Cells) -> Counts:
    return replace(
        counts,
        fingerprints=counts.fingerprints + int(cells.fingerprints.sum() + cells.folds.sum()),
        drafts=int(cells.tokens.sum()),
        acceptances=int(cells.accepted.sum()),
    )
