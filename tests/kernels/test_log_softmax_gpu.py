"""log_softmax compiled on a GPU: vocabularies of models, padding, rows without a maximum."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bitassay.kernels import sample
from bitassay.kernels.sample import log_softmax
from bitassay.reference import sample as reference
from bitassay.reference.spec.contract import Contract, default_contract
from support.hard_matrices import matrix
from support.same_bits import assert_same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiling")]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = ("normal", "scaled", "ties", "wide", "subnormal", "sparse", "cancelling")


@pytest.fixture(autouse=True)
def clear_flag() -> Iterator[None]:
    yield
    sample._NO_MAXIMUM.take()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 65])
@pytest.mark.parametrize("vocabulary", [1, 100, 4096, 32000, 128256, 151936])
def test_vocabularies_of_models(
    contract: Contract, cuda: torch.device, vocabulary: int, rows: int, dtype: str
) -> None:
    g = torch.Generator(cuda).manual_seed(vocabulary + rows)
    x = (torch.randn(rows, vocabulary, device=cuda, generator=g) * 5).to(DTYPES[dtype])
    x[0, vocabulary - vocabulary // 7 :] = -torch.inf  # a padded vocabulary
    got = log_softmax(x, contract=contract)
    assert_same_bits(got, reference.log_softmax(x, contract=contract))
    sample.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sum_width", [16, 1024, 4096])
def test_any_value(
    contract: Contract, cuda: torch.device, sum_width: int, kind: str, dtype: str
) -> None:
    contract = default_contract(contract.arch, sum_width=sum_width)
    x = matrix(kind, 50, 5000, DTYPES[dtype], 1).to(cuda)
    got = log_softmax(x, contract=contract)
    assert_same_bits(got, reference.log_softmax(x, contract=contract))
    sample.check()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_rows_without_a_maximum_are_told_afterwards(
    contract: Contract, cuda: torch.device, wrong: float
) -> None:
    x = torch.zeros(9, 9000, device=cuda)
    x[5, 7000:], x[8, 1] = wrong, wrong
    log_softmax(x, contract=contract)
    with pytest.raises(ValueError, match="row 5: .* first at id 7000:"):
        sample.check()
    sample.check()
