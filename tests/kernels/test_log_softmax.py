"""log_softmax in the emulator: chunks, ragged ends, padding, and rows that have no maximum."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bitassay.kernels import sample
from bitassay.kernels.sample import log_softmax
from bitassay.reference import sample as reference
from bitassay.reference.spec.contract import default_contract
from support.hard_matrices import matrix
from support.same_bits import assert_same_bits

pytestmark = pytest.mark.usefixtures("interpreting")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = ("normal", "scaled", "ties", "wide", "subnormal", "sparse", "cancelling")


@pytest.fixture(autouse=True)
def clear_flag() -> Iterator[None]:
    yield
    sample._NO_MAXIMUM.take()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 16, 17, 48])
def test_any_width(gpu_emulation: str, width: int, dtype: str) -> None:
    contract = default_contract(gpu_emulation, sum_width=16)
    x = matrix("normal", 4, width, DTYPES[dtype], width) * 9
    want = reference.log_softmax(x, contract=contract)
    assert_same_bits(log_softmax(x, contract=contract), want)
    sample.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sum_width", [16, 64])
def test_any_value(gpu_emulation: str, sum_width: int, kind: str, dtype: str) -> None:
    contract = default_contract(gpu_emulation, sum_width=sum_width)
    x = matrix(kind, 3, 75, DTYPES[dtype], 1)
    x[1, 40:], x[2, 1:] = -torch.inf, -torch.inf  # a padded vocabulary; one token alone
    want = reference.log_softmax(x, contract=contract)
    assert_same_bits(log_softmax(x, contract=contract), want)
    sample.check()


def test_the_default_contract(gpu_emulation: str) -> None:
    contract = default_contract(gpu_emulation)
    x = matrix("normal", 2, 4100, torch.bfloat16, 3) * 4
    got = log_softmax(x, contract=contract)
    assert_same_bits(got, reference.log_softmax(x, contract=contract))
    assert ((got - torch.log_softmax(x.float(), 1)).abs() < 1e-5).all()  # and it is the function


def test_the_width_is_part_of_the_order(gpu_emulation: str) -> None:
    x = -9 - matrix("normal", 8, 256, torch.float32, 4).abs()
    x[:, 0] = 0  # sums a little above 1, whose logarithm shows their last bit
    narrow, wide = (
        log_softmax(x, contract=default_contract(gpu_emulation, sum_width=w)) for w in (16, 256)
    )
    assert (narrow[:, 0] != wide[:, 0]).any()


def test_views(gpu_emulation: str) -> None:
    contract = default_contract(gpu_emulation, sum_width=16)
    x = matrix("normal", 4, 40, torch.bfloat16, 5)
    wide = torch.nn.functional.pad(x, (3, 5))[:, 3:43]
    want = reference.log_softmax(x, contract=contract)
    assert_same_bits(log_softmax(wide, contract=contract), want)
    assert_same_bits(log_softmax(x[1:2], contract=contract), want[1:2])
    assert log_softmax(x[:0], contract=contract).shape == (0, 40)


@pytest.mark.parametrize(
    ("row", "first"),
    [
        ([1.0, torch.nan, torch.inf, 2.0], 1),
        ([1.0, 0.0, torch.inf, torch.nan], 2),
        ([-torch.inf, -torch.inf, -torch.inf, torch.nan], 3),
        ([-torch.inf] * 4, 0),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_maximum_are_told_afterwards(
    gpu_emulation: str, dtype: str, row: list[float], first: int
) -> None:
    contract = default_contract(gpu_emulation, sum_width=16)
    x = torch.stack([torch.zeros(4), torch.tensor(row), torch.tensor(row)]).to(DTYPES[dtype])
    x = torch.nn.functional.pad(x, (20, 0), value=-torch.inf)
    got = log_softmax(x, contract=contract)
    assert_same_bits(got[:1], reference.log_softmax(x[:1], contract=contract))
    first = first + 20 if first or row[0] == 1.0 else 0
    with pytest.raises(ValueError, match=f"row 1: expected a finite .* first at id {first}:"):
        sample.check()
    sample.check()
    with pytest.raises(ValueError, match="row 1"):
        reference.log_softmax(x, contract=contract)


def test_what_does_not_fit_is_refused(gpu_emulation: str) -> None:
    contract = default_contract(gpu_emulation)
    x = torch.ones(3, 8)
    with pytest.raises(TypeError, match="found torch.float64"):
        log_softmax(x.double(), contract=contract)
    with pytest.raises(ValueError, match=r"found \[8\]"):
        log_softmax(x[0], contract=contract)
    with pytest.raises(ValueError, match=r"found \[3, 0\]"):
        log_softmax(x[:, :0], contract=contract)
    with pytest.raises(ValueError, match=r"found \[8, 3\] with strides \[1, 8\]"):
        log_softmax(x.t(), contract=contract)
    other = {"sm_89": "sm_90", "sm_90": "sm_89"}[gpu_emulation]
    with pytest.raises(RuntimeError, match=f"contract is {other}'s"):
        log_softmax(x, contract=default_contract(other))
