"""Compares two streams bit by bit and finds where each prompt's first difference is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from bitassay.golden.compare.common import Common, in_common
from bitassay.golden.compare.counts import Counts, Mask, count
from bitassay.golden.compare.diff_drafts import (
    CHOOSING,
    DraftMasks,
    compared,
    differing,
    first_of_prompt,
)
from bitassay.golden.errors import GoldenError
from bitassay.golden.streams.token_stream import TokenStream

_BY_STEP = ("tokens", "top_ids", "top_bits", "margins", "fingerprints")
_COMPARED = (*_BY_STEP, "prompt_fingerprints")


@dataclass(frozen=True)
class Difference:
    """Where one prompt's stream first differs, in what was compared.

    prompt: its index. step: None when the prompt's own rows differ. operations: those whose rows
    differ there, by fingerprint, in running order; none when all rows are equal, and so the
    choice among the logits differs, or how many drafts were accepted, and none where no
    fingerprints of those rows were compared. arrays: those that differ at this step. draft: which
    of the tokens drafted after this one, counted from 0; None where it is the target that differs,
    or the count of accepted drafts.
    """

    prompt: int
    step: int | None
    operations: tuple[str, ...]
    arrays: tuple[str, ...]
    draft: int | None = None


@dataclass(frozen=True)
class Comparison:
    """What was compared, what of it differs, and the first difference of each differing stream.

    common: what both streams have; nothing else was compared.
    """

    expected: TokenStream
    found: TokenStream
    compared: Counts
    different: Counts
    differences: tuple[Difference, ...]
    common: Common

    @property
    def equal(self) -> bool:
        """Whether every bit that was compared is equal; `whole` says whether that is all."""
        return not self.differences

    @property
    def whole(self) -> bool:
        """Whether everything that the expected stream has was compared."""
        return not self.common.absent

    @property
    def not_compared(self) -> tuple[str, ...]:
        """The arrays that the expected stream has and the found one has not, in their order.

        "drafts" stands for all arrays of the drafts. Where fingerprints of some operations are
        lacking, the entry names them: "fingerprints of layers.0.o_proj, layers.0.mlp_residual".
        """
        return tuple(map(str, self.common.absent))


def compare(expected: TokenStream, found: TokenStream) -> Comparison:
    """Compare what both streams have; GoldenError when they cannot be compared.

    They are of the same prompts, and the operations found are some of the expected ones. Where the
    expected drafts are those of a run (drafts.run_of), what the run came to is compared and nothing
    else: an engine drafts beyond the first mismatch, and a golden does not.
    """
    _require_comparable(expected, found)
    common = in_common(expected, found)
    unequal = {
        name: getattr(common.expected, name) != getattr(common.found, name)
        for name in _COMPARED
        if getattr(common.expected, name) is not None
    }
    drafts = _differing_drafts(common)
    first = [_first(common, unequal, drafts, s) for s in range(len(expected.prompt_names))]
    differences = tuple(difference for difference in first if difference)
    every = {name: np.ones_like(mask) for name, mask in unequal.items()}
    marked = compared(common.expected.drafts) if common.expected.drafts else None
    return Comparison(
        expected,
        found,
        compared=count(len(expected.prompt_names), every, marked),
        different=count(len(differences), unequal, drafts),
        differences=differences,
        common=common,
    )


def _require_comparable(expected: TokenStream, found: TokenStream) -> None:
    for name in ("prompt_ids", "prompt_offsets"):
        if not np.array_equal(getattr(expected, name), getattr(found, name)):
            raise GoldenError("the two streams continue different prompts")
    _require_same("steps", expected.steps, found.steps)
    _require_among("operations", expected.operations, found.operations)
    if expected.logits_dtype is not None and found.logits_dtype is not None:
        _require_same("logits_dtype", expected.logits_dtype, found.logits_dtype)
    _require_same("vocab_size", expected.vocab_size, found.vocab_size)
    want, got = expected.drafts, found.drafts
    if want is None and got is not None:
        _require_same("drafts", "no drafts", "drafts")
    if want is None or got is None:
        return
    _require_among("draft_operations", want.draft_operations, got.draft_operations)
    if (want.rounds is None) != (got.rounds is None):
        raise GoldenError("the drafts of a run are compared with those of a run alone")


def _require_same(name: str, expected: object, found: object) -> None:
    if expected != found:
        raise GoldenError(f"the two streams differ in {name}: expected {expected}, found {found}")


def _require_among(
    name: str, expected: tuple[str, ...] | None, found: tuple[str, ...] | None
) -> None:
    """Raise GoldenError unless what is found is part of the expected, in the same order."""
    if expected is not None and found is not None:
        among = tuple(operation for operation in expected if operation in found)
        if among != found:
            _require_same(name, expected, found)


def _differing_drafts(common: Common) -> DraftMasks | None:
    """What differs among the drafts; None where there are none to compare."""
    want, got = common.expected.drafts, common.found.drafts
    return None if want is None or got is None else differing(want, got)


def _first(
    common: Common, unequal: Mapping[str, Mask], masks: DraftMasks | None, s: int
) -> Difference | None:
    own = _first_of_target(common.expected, unequal, s)
    want, got = common.expected.drafts, common.found.drafts
    if want is None or got is None or masks is None:
        return own
    folded = () if masks.folds is None else _named(want.draft_operations, masks.folds[s])
    if folded:
        if own is None or own.step is not None:
            return Difference(s, None, folded, ("draft_prompt_fingerprints",))
        arrays = (*own.arrays, "draft_prompt_fingerprints")
        return Difference(s, None, (*own.operations, *folded), arrays)
    drafted = first_of_prompt(want, got, masks, s)
    if drafted is None or (own and (own.step is None or (own.step, CHOOSING) < drafted.order)):
        return own
    return Difference(s, drafted.step, drafted.operations, drafted.arrays, drafted.draft)


def _first_of_target(stream: TokenStream, unequal: Mapping[str, Mask], s: int) -> Difference | None:
    if "prompt_fingerprints" in unequal:
        folded = _named(stream.operations, unequal["prompt_fingerprints"][s])
        if folded:
            return Difference(s, None, folded, ("prompt_fingerprints",))
    by_step = {
        name: unequal[name][s].reshape(stream.steps, -1) for name in _BY_STEP if name in unequal
    }
    steps = np.flatnonzero(np.logical_or.reduce([x.any(axis=1) for x in by_step.values()]))
    if not steps.size:
        return None
    step = int(steps[0])
    rows = by_step.get("fingerprints")
    operations = () if rows is None else _named(stream.operations, rows[step])
    arrays = tuple(name for name, mask in by_step.items() if mask[step].any())
    return Difference(s, step, operations, arrays)


def _named(operations: tuple[str, ...] | None, marked: Mask) -> tuple[str, ...]:
    """The names of the operations that are marked: [O] -> some of them, in running order."""
    return tuple((operations or ())[o] for o in np.flatnonzero(marked))
