"""Compiled products on a GPU: every tile, awkward values and great sizes, all outputs compared."""

from __future__ import annotations

import pytest
import torch

from bitassay.kernels import tiles
from bitassay.kernels.device import multiprocessors
from bitassay.kernels.linear import bmm, linear, lm_head
from bitassay.reference import linear as reference
from bitassay.reference.floats import canonical_nan
from bitassay.reference.spec.contract import Contract, default_contract
from support.hard_matrices import KINDS, matrix
from support.matmul_cases import mixed
from support.same_bits import assert_same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiling")]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ["normal", "mixed"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 264, 136), (17, 520, 200), (300, 1032, 1048), (129, 4096, 16)]
)
def test_every_tile(
    contract: Contract, cuda: torch.device, m: int, n: int, k: int, values: str, dtype: str
) -> None:
    kind = DTYPES[dtype]
    draw = mixed if values == "mixed" else lambda *shape: matrix("normal", *shape)
    x, weight = (draw(rows, k, kind, seed).to(cuda) for rows, seed in ((m, 1), (n, 2)))
    bias = matrix("special", 1, n, kind, 3)[0].to(cuda)
    want = reference.linear(x, weight, bias, contract=contract)
    for tile in tiles.candidates(contract.arch, kind):
        try:
            assert_same_bits(linear(x, weight, bias, contract=contract, tile=tile), want)
        except AssertionError as error:
            raise AssertionError(f"{tile}: {error}") from error


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 33, 1), (5, 1003, 33), (70, 129, 1000), (200, 96, 72)]
)
def test_any_value_and_shape(
    contract: Contract, cuda: torch.device, m: int, n: int, k: int, kind: str, dtype: str
) -> None:
    x = matrix(kind, m, k, DTYPES[dtype], 1).to(cuda)
    weight = matrix(kind, n, k, DTYPES[dtype], 2).to(cuda)
    bias = matrix(kind, 1, n, DTYPES[dtype], 3)[0].to(cuda)
    for b in (None, bias):
        got = linear(x, weight, b, contract=contract)
        assert_same_bits(got, reference.linear(x, weight, b, contract=contract))


@pytest.mark.parametrize("logits_dtype", ["weight", "float32"])
@pytest.mark.parametrize("vocab_size", [1, 1000, 1024])
@pytest.mark.parametrize("m", [1, 16, 40, 100, 200, 500])
def test_lm_head(
    cuda: torch.device, contract: Contract, m: int, vocab_size: int, logits_dtype: str
) -> None:
    contract = default_contract(contract.arch, logits_dtype=logits_dtype)  # type: ignore[arg-type]
    hidden, weight = (mixed(rows, 264, torch.bfloat16, rows).to(cuda) for rows in (m, 1024))
    bias = matrix("special", 1, 1024, torch.bfloat16, 3)[0].to(cuda)
    want = reference.lm_head(hidden, weight, bias, contract=contract, vocab_size=vocab_size)
    got = lm_head(hidden, weight, bias, contract=contract, vocab_size=vocab_size)
    assert_same_bits(got, canonical_nan(want))


@pytest.mark.parametrize("m", [3, 40, 300])
def test_any_strides(contract: Contract, cuda: torch.device, m: int) -> None:
    x, weight = (mixed(rows, 200, torch.bfloat16, rows).to(cuda) for rows in (m, 264))
    want = reference.linear(x, weight, contract=contract)
    wide = torch.zeros(m, 232, dtype=x.dtype, device=cuda)[:, 8:208].copy_(x)
    odd = torch.zeros(m, 201, dtype=x.dtype, device=cuda)[:, 1:].copy_(x)
    columns = x.t().contiguous().t()
    for view in (wide, odd, columns):
        for other in (weight, weight.t().contiguous().t()):
            assert_same_bits(linear(view, other, contract=contract), want)


def test_offsets_beyond_31_bits(contract: Contract, cuda: torch.device) -> None:
    if torch.cuda.get_device_properties(cuda).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    generator = torch.Generator(cuda).manual_seed(0)
    some = {"device": cuda, "dtype": torch.bfloat16, "generator": generator}
    weight = torch.randn(300_000, 64, **some)  # M * N = 2.4 * 2^30
    x = torch.randn(8192, 64, **some)
    last = slice(8191, 8192)
    got = linear(x, weight, contract=contract)
    assert_same_bits(got[last], reference.linear(x[last], weight, contract=contract))
    del got
    tall = torch.randn(9_000_000, 256, **some)  # N * K = 2.1 * 2^30
    got = linear(x[:2].repeat(1, 4), tall, contract=contract)
    want = reference.linear(x[:2].repeat(1, 4), tall[-1000:], contract=contract)
    assert_same_bits(got[:, -1000:].contiguous(), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bmm(contract: Contract, cuda: torch.device, dtype: str) -> None:
    x = torch.stack([mixed(20, 72, DTYPES[dtype], s) for s in range(5)]).to(cuda)
    weight = torch.stack([mixed(40, 72, DTYPES[dtype], s) for s in range(10, 15)]).to(cuda)
    pairs = zip(x, weight, strict=True)
    want = torch.stack([reference.linear(a, b, contract=contract) for a, b in pairs])
    assert_same_bits(bmm(x, weight, contract=contract), want)
    many = x[:1, :1].expand(70_000, -1, -1)  # more than a grid's second axis
    got = bmm(many, weight[:1].expand(70_000, -1, -1), contract=contract)
    assert_same_bits(got, want[:1, :1].expand(70_000, -1, -1).contiguous())


def test_another_device_is_refused(contract: Contract, cuda: torch.device) -> None:
    x = torch.ones(1, 16, device=cuda).bfloat16()
    other = "sm_80" if contract.arch != "sm_80" else "sm_90"
    with pytest.raises(RuntimeError, match=f"the contract is {other}'s, cuda:0 has compute"):
        linear(x, x, contract=default_contract(other))
    with pytest.raises(RuntimeError, match="kernels run on CUDA tensors, found cpu"):
        linear(x.cpu(), x.cpu(), contract=contract)


def test_inside_a_cuda_graph(contract: Contract, cuda: torch.device) -> None:
    x, weight = (mixed(rows, 64, torch.bfloat16, rows).to(cuda) for rows in (300, 264))
    want = reference.linear(x, weight, contract=contract)
    linear(x, weight, contract=contract)  # compiles
    torch.cuda.synchronize()
    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        out = linear(static, weight, contract=contract)
    static.copy_(x)
    graph.replay()
    assert_same_bits(out, want)
    assert multiprocessors(x.device) > 1
