"""Compares two streams bit by bit and finds where each prompt's first difference is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import GoldenError
from .stream import TokenStream

_BY_STEP = ("tokens", "top_ids", "top_bits", "margins", "fingerprints")


@dataclass(frozen=True)
class Counts:
    """How many values there are, or how many of them differ."""

    streams: int
    tokens: int
    logits: int
    fingerprints: int


@dataclass(frozen=True)
class Difference:
    """Where one prompt's stream first differs.

    prompt: its index. step: None when the prompt's own rows differ. operations: those whose rows
    differ there, by fingerprint, in running order; none when all rows are equal, and so the
    choice among the logits differs. arrays: those that differ at this step.
    """

    prompt: int
    step: int | None
    operations: tuple[str, ...]
    arrays: tuple[str, ...]


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
    """Compare two streams of the same prompts; GoldenError when they cannot be compared."""
    for name in ("prompt_ids", "prompt_offsets"):
        if not np.array_equal(getattr(expected, name), getattr(found, name)):
            raise GoldenError("the two streams continue different prompts")
    for name in ("steps", "operations", "logits_dtype", "vocab_size"):
        if (a := getattr(expected, name)) != (b := getattr(found, name)):
            raise GoldenError(f"the two streams differ in {name}: expected {a}, found {b}")
    first = [_first(expected, found, s) for s in range(len(expected.prompt_names))]
    differences = tuple(difference for difference in first if difference)
    return Comparison(
        expected,
        found,
        compared=_compared(expected),
        different=_different(expected, found, len(differences)),
        differences=differences,
    )


def _first(expected: TokenStream, found: TokenStream, s: int) -> Difference | None:
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
    return Counts(
        streams=len(stream.prompt_names),
        tokens=stream.tokens.size,
        logits=stream.top_bits.size,
        fingerprints=stream.fingerprints.size + stream.prompt_fingerprints.size,
    )


def _different(expected: TokenStream, found: TokenStream, streams: int) -> Counts:
    logits = (expected.top_bits != found.top_bits) | (expected.top_ids != found.top_ids)
    fingerprints = (expected.fingerprints != found.fingerprints).sum()
    folded = (expected.prompt_fingerprints != found.prompt_fingerprints).sum()
    return Counts(
        streams=streams,
        tokens=int((expected.tokens != found.tokens).sum()),
        logits=int(logits.sum()),
        fingerprints=int(fingerprints + folded),
    )
