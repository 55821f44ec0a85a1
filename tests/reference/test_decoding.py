"""What greedy decoding asks of any model: fit ids, and what a row of logits chooses."""

from __future__ import annotations

import pytest
import torch

from bitassay.reference.decoding import check_ids, check_sequence, choose
from bitassay.reference.spec.errors import SequenceError
from support.hard_matrices import matrix
from support.naive import tensor_core as twin
from support.same_bits import patterns

FORMATS = {torch.bfloat16: twin.BF16, torch.float16: twin.FP16, torch.float32: twin.FP32}


def test_ids_become_int64() -> None:
    given = [[1, 2], torch.tensor([3], dtype=torch.int32), (4, 5, 6), torch.tensor([7]).byte()]
    checked = check_ids(given, 8)
    assert [ids.tolist() for ids in checked] == [[1, 2], [3], [4, 5, 6], [7]]
    assert all(ids.dtype == torch.int64 for ids in checked)
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    assert [ids.tolist() for ids in check_ids(table, 8)] == [[0, 1], [2, 3]]
    assert check_ids([], 8) == []


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        ([], r"prompt 1: expected at least one token id, found shape \[0\]"),
        ([[1]], r"prompt 1: expected at least one token id, found shape \[1, 1\]"),
        (5, r"prompt 1: expected at least one token id, found shape \[\]"),
        ([1.5], "prompt 1: expected integer ids, found torch.float32"),
        ([True], "prompt 1: expected integer ids, found torch.bool"),
        ([1j], "prompt 1: expected integer ids, found torch.complex64"),
        ([0, 8], r"prompt 1, position 1: .* 0 … 7 \(vocabulary of 8\), found 8: encode"),
        ([0, 1, -1], "prompt 1, position 2: .* found -1"),
    ],
)
def test_ids_that_are_refused(sequence: object, message: str) -> None:
    with pytest.raises(SequenceError, match=f"^{message}") as of_prompt:
        check_ids([[0], sequence], 8)
    with pytest.raises(SequenceError, match=f"^things of {message}"):
        check_ids([[0], sequence], 8, "things")
    with pytest.raises(SequenceError) as alone:
        check_sequence(sequence, 8)
    assert (of_prompt.value.prompt, alone.value.prompt) == (1, None)
    assert of_prompt.value.position == alone.value.position
    assert of_prompt.value.problem == alone.value.problem


@pytest.mark.parametrize("dtype", list(FORMATS))
def test_a_choice_equals_the_twin(dtype: torch.dtype) -> None:
    fmt = FORMATS[dtype]
    logits = torch.cat([matrix(kind, 2, 40, dtype, 1) for kind in ("normal", "ties", "wide")])
    logits[0, 3:30] = -torch.inf
    logits[1] = -0.0
    tokens, ids, top, margins = choose(logits, [(0, step) for step in range(6)])
    rows = [patterns(row) for row in logits]
    best = [twin.top_k(row, 8, fmt) for row in rows]
    assert tokens.tolist() == [chosen[0] for chosen in best]
    assert ids.tolist() == best
    assert top.tolist() == [[r[i] for i in chosen] for r, chosen in zip(rows, best, strict=True)]
    assert margins.tolist() == [twin.margin(row, fmt) for row in rows]
    assert [x.dtype for x in (tokens, ids, top, margins)] == [
        torch.int32, torch.int32, torch.int64, torch.int64,
    ]  # fmt: skip


def test_nan_names_prompt_step_and_id() -> None:
    logits = torch.zeros(3, 9).bfloat16()
    logits[1, 7] = logits[2, 0] = torch.nan
    with pytest.raises(SequenceError, match=r"^prompt 4, step 2: .*NaN, first at id 7") as found:
        choose(logits, [(4, 1), (4, 2), (5, 0)])
    assert (found.value.prompt, found.value.step) == (4, 2)
