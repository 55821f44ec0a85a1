"""Embedding, fingerprints and sampling, compiled on a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from bitassay.kernels import embedding as embeddings
from bitassay.kernels import sample
from bitassay.kernels.embedding import embedding
from bitassay.kernels.fingerprint import fingerprint_rows, fold
from bitassay.reference import embedding as reference_embedding
from bitassay.reference import fingerprint as reference_fingerprint
from bitassay.reference import sample as reference_sample
from support.hard_matrices import matrix
from support.same_bits import assert_same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiling")]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def clear_flags() -> Iterator[None]:
    yield
    embeddings._OUTSIDE.take()
    sample._NANS.take()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "height", "width"), [(1, 1, 1), (300, 77, 1030), (9, 3, 5000)])
def test_embedding(
    cuda: torch.device, count: int, height: int, width: int, dtype: torch.dtype
) -> None:
    weight = matrix("patterns", height, width, dtype, 1).to(cuda)
    ids = torch.randint(0, height, (count,), device=cuda)
    want = reference_embedding.embedding(ids, weight)
    assert_same_bits(embedding(ids, weight), want)
    assert_same_bits(embedding(ids.int(), weight.t().contiguous().t()), want)
    embeddings.check()


def test_embedding_beyond_31_bits(cuda: torch.device) -> None:
    if torch.cuda.get_device_properties(cuda).total_memory < 16 << 30:
        pytest.skip("needs 16 GiB of GPU memory")
    weight = torch.zeros(600_000, 4096, dtype=torch.bfloat16, device=cuda)
    weight[-1] = 1
    ids = torch.tensor([599_999, 0], device=cuda)
    assert embedding(ids, weight).sum(1).tolist() == [4096, 0]


def test_ids_outside_are_told_without_waiting(cuda: torch.device) -> None:
    weight = torch.ones(50, 300, device=cuda)
    ids = torch.randint(0, 50, (5000,), device=cuda)
    ids[4000], ids[123] = 50, -7
    torch.cuda.synchronize()
    with warnings.catch_warnings(action="ignore"):  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        got = embedding(ids, weight)
        sample.decide(got, 8)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert got.isnan().all(1).nonzero().flatten().tolist() == [123, 4000]
    with pytest.raises(ValueError, match="token id -7 at position 123"):
        embeddings.check()
    with pytest.raises(ValueError, match="row 123, first at id 0"):
        sample.check()
    embeddings.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 3000), (3, 151_936), (4096, 65)])
def test_fingerprints(cuda: torch.device, rows: int, columns: int, dtype: torch.dtype) -> None:
    x = matrix("patterns", rows, columns, dtype, 1).to(cuda)
    got = fingerprint_rows(x)
    assert_same_bits(got, reference_fingerprint.fingerprint_rows(x))
    assert_same_bits(got, reference_fingerprint.fingerprint_rows(x.cpu()))
    assert_same_bits(fold(got), reference_fingerprint.fold(got))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "ties", "wide", "subnormal"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 9), (5, 4096), (3, 151_936)])
def test_sampling(
    cuda: torch.device, rows: int, columns: int, kind: str, dtype: torch.dtype
) -> None:
    logits = matrix(kind, rows, columns, dtype, 1).to(cuda)
    values, ids, margins = sample.decide(logits, 8)
    for got, want in zip((values, ids), reference_sample.top_k(logits.cpu(), 8), strict=True):
        assert_same_bits(got, want)
    assert_same_bits(sample.greedy(logits), reference_sample.greedy(logits.cpu()))
    assert_same_bits(margins, reference_sample.margin_ulps(logits.cpu()))
    sample.check()
