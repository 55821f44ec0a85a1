"""Verification and the packing of steps, on numbers that are made up."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitassay.engine.scheduling.step_plan import Rows
from bitassay.engine.step.cuda_graphs import padded
from bitassay.engine.step.inputs import Inputs, Sizes, pack, sizes_of
from bitassay.engine.step.verify import Verified, verify

K = 3
# A chunk of a prompt, the end of one, a full round, a short one at the end of a sequence.
STEP = [
    Rows(0, [4, 2, 7], 14, [10, 11, 12], 0, False, 13, 60),
    Rows(1, [5], 3, [20, 21], 0, True, None, 60),
    Rows(2, [1, 6, 8], 30, [30, 31, 32, 33], 3, True, None, 60),
    Rows(3, [0], 8, [40, 41], 1, True, None, 9),
]


def packed(step: list[Rows], sizes: Sizes) -> Inputs:
    buffer = np.full(sizes.nbytes, 0xA5, dtype=np.uint8)
    pack(step, sizes, buffer)
    return Inputs.of(torch.from_numpy(buffer), sizes)


def verified(step: list[Rows], chosen: list[int]) -> Verified:
    return verify(packed(step, sizes_of(step, K)), torch.tensor(chosen))


@pytest.mark.parametrize(
    ("choices", "accepted"),
    [
        ([9, 9, 9, 9], 0),
        ([31, 9, 9, 9], 1),
        ([31, 32, 9, 9], 2),
        ([31, 32, 33, 9], 3),
        ([9, 32, 33, 9], 0),  # right again after a wrong one
        ([31, 9, 33, 9], 1),
        ([32, 33, 31, 9], 0),
    ],
)
def test_leading_drafts_are_accepted(choices: list[int], accepted: int) -> None:
    got = verified(STEP[2:3], choices)
    assert got.accepted.tolist() == [accepted]
    assert got.choices.tolist() == [choices]
    assert (got.base.tolist(), got.position.tolist()) == ([accepted], [30 + accepted])


@pytest.mark.parametrize(("choice", "accepted"), [(41, 1), (9, 0)])
def test_no_more_is_accepted_than_was_drafted(choice: int, accepted: int) -> None:
    """What stands in for a draft that there is not equals the choice, and does not count."""
    got = verified(STEP[3:], [choice, 41])
    assert got.accepted.tolist() == [accepted]


def test_sequences_beside_each_other() -> None:
    got = verified(STEP, [22, 31, 32, 9, 8, 41, 42])
    assert got.accepted.tolist() == [0, 2, 1]
    assert got.choices[:, 0].tolist() == [22, 31, 41]
    assert [int(c[a]) for c, a in zip(got.choices, got.accepted, strict=True)] == [22, 9, 42]
    assert got.base.tolist() == [4, 7, 10]  # rows of the step
    assert got.position.tolist() == [4, 32, 9]


def test_a_step_is_packed() -> None:
    x = packed(STEP, sizes_of(STEP, K))
    assert x["ids"].tolist() == [10, 11, 12, 20, 21, 30, 31, 32, 33, 40, 41]
    assert x["positions"].tolist() == [14, 15, 16, 3, 4, 30, 31, 32, 33, 8, 9]
    blocks = [4, 4, 2, 5, 5, 6, 6, 8, 8, 0, 0]
    offsets = [14, 15, 0, 3, 4, 14, 15, 0, 1, 8, 9]
    assert x["slots"].tolist() == [16 * b + o for b, o in zip(blocks, offsets, strict=True)]
    assert x["next_ids"].tolist() == [11, 12, 13, 21, -1, -1, -1, -1, -1, -1, -1]
    assert x["query_start"].tolist() == [0, 3, 5, 9, 11]
    assert x["seq_lens"].tolist() == [17, 5, 34, 10]
    assert x["tables"].tolist() == [[4, 2, 7], [5, 0, 0], [1, 6, 8], [0, 0, 0]]
    assert x["choosing"].tolist() == [4, 5, 6, 7, 8, 9, 10]
    assert x["tails"].tolist() == [[0, 0, 0, 0], [1, 2, 3, 4], [5, 6, 6, 6]]
    assert x["drafted"].tolist() == [0, 3, 1]
    assert x["first"].tolist() == [4, 30, 8]
    assert x["limit"].tolist() == [60, 60, 9]
    assert x["sequence"].tolist() == [1, 2, 3]
    assert x["count"].tolist() == [3]


@pytest.mark.parametrize("step", [STEP[2:], []], ids=["two", "none"])
def test_padding_belongs_to_nobody(step: list[Rows]) -> None:
    sizes = padded(sizes_of(STEP[1:], K), 4, 10)
    assert (sizes.rows, sizes.sequences, sizes.tails, sizes.width) == (16, 4, 4, 10)
    x, rows = packed(step, sizes), sum(len(r.ids) for r in step)
    assert (x["slots"][:rows] >= 0).all()
    assert (x["slots"][rows:] == -1).all()
    assert (x["query_start"][len(step) :] == rows).all()
    assert x["count"].tolist() == [len(step)]
    assert x["choosing"].tolist() == list(range(16))
    assert (x["tails"][len(step) :] == 15).all()
    for name in ("ids", "positions"):
        assert not x[name][rows:].any()


@pytest.mark.parametrize(
    ("tails", "width", "rows", "blocks"),
    [(1, 1, 4, 64), (3, 65, 16, 128), (5, 129, 28, 200), (7, 200, 28, 200), (9, 1, 36, 64)],
)
def test_few_shapes_are_captured(tails: int, width: int, rows: int, blocks: int) -> None:
    """Powers of two, no more than 7 sequences and 200 blocks, and always room for what is there."""
    got = padded(Sizes(99, tails, 99, tails, K, width, 4), 7, 200)
    assert (got.rows, got.width) == (rows, blocks)


def test_arrays_are_aligned() -> None:
    """A kernel compiled for one step serves all: pointers are as aligned in each."""
    for tails in range(1, 5):
        x = packed([], Sizes(tails * 4, tails, tails * 4, tails, K, 3, 4, padded=True))
        start = x["ids"].data_ptr()
        assert all((array.data_ptr() - start) % 64 == 0 for array in x.arrays.values())
