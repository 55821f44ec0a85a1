"""Log-probabilities against a twin in integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitassay.reference.sample import log_softmax
from bitassay.reference.spec.contract import Contract, default_contract
from support.hard_matrices import matrix
from support.naive import operations as op
from support.same_bits import assert_same_bits, from_patterns, patterns

KIND = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
every_dtype = pytest.mark.parametrize("dtype", list(KIND))


def narrow(width: int = 16) -> Contract:
    return default_contract("sm_90", sum_width=width)


def assert_equals_twin(logits: Tensor, contract: Contract) -> None:
    got = log_softmax(logits, contract=contract)
    assert got.dtype == torch.float32
    for row, of_row in zip(got, logits, strict=True):
        want = op.log_softmax(patterns(of_row), KIND[logits.dtype], contract.sum_width)
        assert_same_bits(row, from_patterns(want, torch.float32))


@every_dtype
@pytest.mark.parametrize("kind", ["normal", "scaled", "wide", "ties", "subnormal", "huge"])
def test_equals_the_twin(kind: str, dtype: torch.dtype) -> None:
    for columns in (1, 2, 15, 16, 17, 47, 100):
        logits = matrix(kind, 2, columns, dtype, seed=columns)
        logits = torch.where(logits.isfinite(), logits, -torch.inf)
        logits[:, 0] = logits[:, 0].nan_to_num(neginf=0.0)
        for width in (16, 32):
            assert_equals_twin(logits, narrow(width))


def test_more_columns_than_one_default_tree_equal_the_twin() -> None:
    """4,096 columns and then 300, in the magnitudes of real logits."""
    assert_equals_twin(matrix("normal", 1, 4396, torch.bfloat16, 1) * 4, default_contract("sm_90"))


def test_chunks_are_added_ascending() -> None:
    """256 chunks whose sums are 1, then half an ulp each: only the first addition order loses."""
    logits = torch.full((1, 64), -torch.inf)
    logits[0, ::16] = torch.tensor([0.0, -17.0, -17.0, -17.0])
    assert_equals_twin(logits, narrow())
    assert_equals_twin(logits.flip(1), narrow())
    many = torch.full((1, 16 * 300), -torch.inf)
    many[0, ::16] = matrix("normal", 1, 300, torch.float32, 2)[0] - 12
    many[0, 0] = 0.0
    assert_equals_twin(many, narrow())
    assert log_softmax(many, contract=narrow())[0, 0] != log_softmax(
        many.flip(1), contract=narrow()
    )[0].flip(0)[0]  # fmt: skip


def test_the_width_of_a_tree_is_part_of_the_order() -> None:
    logits = matrix("normal", 20, 300, torch.float32, 3)
    outputs = [log_softmax(logits, contract=narrow(width)) for width in (16, 64, 256, 4096)]
    assert any(not torch.equal(outputs[0], other) for other in outputs[1:])
    assert_same_bits(log_softmax(logits, contract=narrow(512)), outputs[-1])  # one tree either way


def test_equal_logits_and_padding() -> None:
    logits = torch.zeros(1, 1024).bfloat16()
    want = -torch.tensor(1024.0).double().log().float()
    assert_same_bits(log_softmax(logits, contract=narrow())[0], want.expand(1024))
    logits[0, 512:] = -torch.inf  # a vocabulary's padding
    got = log_softmax(logits, contract=narrow())[0]
    assert_same_bits(got[512:], torch.full((512,), -torch.inf))
    assert_same_bits(got[:512], log_softmax(logits[:, :512], contract=narrow())[0])
    one = torch.tensor([[3.0]])
    assert_same_bits(log_softmax(one, contract=narrow()), torch.zeros(1, 1))


def test_close_to_torch_in_float64() -> None:
    """A sanity check: within some ulps of the true value."""
    logits = matrix("normal", 8, 1000, torch.float32, 4) * 5
    want = logits.double().log_softmax(1)
    got = log_softmax(logits, contract=default_contract("sm_89")).double()
    assert ((got - want).abs() <= 2.0**-20 * want.abs().clamp_min(1)).all()


def test_rows_are_independent() -> None:
    logits = matrix("normal", 7, 100, torch.bfloat16, 5)
    whole = log_softmax(logits, contract=narrow())
    for i in range(7):
        assert_same_bits(log_softmax(logits[i : i + 1], contract=narrow()), whole[i : i + 1])
    strided = logits.t().contiguous().t()
    assert_same_bits(log_softmax(strided, contract=narrow()), whole)


def test_what_is_refused() -> None:
    logits = torch.zeros(4, 9)
    logits[2, 7] = torch.nan
    with pytest.raises(ValueError, match=r"NaN.*row 2.*id 7"):
        log_softmax(logits, contract=narrow())
    logits[2, 7], logits[1, 5] = 0.0, torch.inf
    with pytest.raises(ValueError, match=r"row 1: .*finite.*found inf, first at id 5"):
        log_softmax(logits, contract=narrow())
    logits[1] = -torch.inf
    with pytest.raises(ValueError, match=r"row 1: .*finite.*found -inf"):
        log_softmax(logits, contract=narrow())
