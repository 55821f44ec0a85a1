"""rms_norm and add_rms_norm compiled on a GPU: a model's shapes, every launch, any value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitassay.kernels.linear_pointer import INTERPRETED
from bitassay.kernels.norm import Shape, add_rms_norm, rms_norm
from bitassay.reference import norm as reference
from support.hard_matrices import KINDS, matrix
from support.many_rows import many
from support.matmul_cases import mixed
from support.same_bits import assert_same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED, reason="needs compiled kernels: run with TRITON_INTERPRET=0"),
]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
EPS = 1e-5


def check(x: Tensor, residual: Tensor, weight: Tensor, eps: float, **options: object) -> None:
    got = rms_norm(x, weight, eps=eps, **options)  # type: ignore[arg-type]
    assert_same_bits(got, reference.rms_norm(x, weight, eps=eps))
    got = add_rms_norm(x, residual, weight, eps=eps, **options)  # type: ignore[arg-type]
    for one, want in zip(got, reference.add_rms_norm(x, residual, weight, eps=eps), strict=True):
        assert_same_bits(one, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 2048])
@pytest.mark.parametrize("width", [1, 64, 100, 128, 256, 1000, 2048, 2560, 4096, 14336, 16384])
def test_shapes_of_models(cuda: torch.device, width: int, rows: int, dtype: str) -> None:
    x, residual = (many(rows, width, DTYPES[dtype], seed, cuda) for seed in (1, 100))
    check(x, residual, matrix("normal", 1, width, DTYPES[dtype], 3)[0].to(cuda), EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [128, 2048, 4096])
def test_any_value(cuda: torch.device, width: int, kind: str, dtype: str) -> None:
    x, residual = (matrix(kind, 64, width, DTYPES[dtype], seed).to(cuda) for seed in (1, 2))
    weight = matrix(kind, 1, width, DTYPES[dtype], 3)[0].to(cuda)
    for eps in (0.0, 1e-6, 1.0):
        check(x, residual, weight, eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_sum_of_the_residual(cuda: torch.device, dtype: str) -> None:
    """All 2**16 values plus awkward ones: the compiler may add in the 16-bit type."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(DTYPES[dtype]).to(cuda)
    others = matrix("patterns", 1, 256, DTYPES[dtype], 1)[0]
    others = torch.cat([others, matrix("subnormal", 1, 256, DTYPES[dtype], 2)[0]]).to(cuda)
    weight = torch.ones(4096, dtype=DTYPES[dtype], device=cuda)
    for some in others.split(64):
        x = every.expand(len(some), -1).reshape(-1, 4096)
        residual = some[:, None].expand(-1, len(every)).reshape(-1, 4096)
        got = add_rms_norm(x, residual, weight, eps=EPS)
        want = reference.add_rms_norm(x, residual, weight, eps=EPS)
        assert_same_bits(got[1], want[1])
        assert_same_bits(got[0], want[0])


@pytest.mark.parametrize("warps", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("width", "rows"), [(64, 1), (64, 16), (128, 8), (1000, 2), (4096, 1)])
def test_no_launch_changes_a_bit(cuda: torch.device, width: int, rows: int, warps: int) -> None:
    x, residual = (mixed(37, width, torch.bfloat16, seed).to(cuda) for seed in (1, 100))
    weight = matrix("normal", 1, width, torch.bfloat16, 3)[0].to(cuda)
    check(x, residual, weight, EPS, shape=Shape(rows, warps))


@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_heads_of_a_packed_product(cuda: torch.device, tokens: int) -> None:
    packed = mixed(tokens, 24 * 128, torch.bfloat16, 7).to(cuda).view(tokens, 24, 128)
    weight = matrix("normal", 1, 128, torch.bfloat16, 8)[0].to(cuda)
    out = torch.zeros(tokens, 20, 128, dtype=torch.bfloat16, device=cuda)
    rms_norm(packed[:, :16], weight, eps=1e-6, out=out[:, :16])
    rms_norm(packed[:, 16:20], weight, eps=1e-6, out=out[:, 16:])
    assert_same_bits(out, reference.rms_norm(packed[:, :20], weight, eps=1e-6))


def test_in_place_and_beside_neighbours(cuda: torch.device) -> None:
    x, residual = (mixed(100, 4096, torch.bfloat16, seed).to(cuda) for seed in (1, 200))
    weight = matrix("normal", 1, 4096, torch.bfloat16, 3)[0].to(cuda)
    want = reference.add_rms_norm(x, residual, weight, eps=EPS)
    alone = add_rms_norm(x[40:41], residual[40:41], weight, eps=EPS)
    add_rms_norm(x, residual, weight, eps=EPS, out=x, residual_out=residual)
    assert_same_bits(x, want[0])
    assert_same_bits(residual, want[1])
    assert_same_bits(alone[0], want[0][40:41])


def test_inside_a_cuda_graph(cuda: torch.device) -> None:
    x, residual = (mixed(5, 256, torch.bfloat16, seed).to(cuda) for seed in (1, 200))
    weight = matrix("normal", 1, 256, torch.bfloat16, 3)[0].to(cuda)
    want = add_rms_norm(x, residual, weight, eps=EPS)  # compiles
    torch.cuda.synchronize()
    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(x)
    with torch.cuda.graph(graph):
        out = add_rms_norm(static, residual, weight, eps=EPS)
    static.copy_(x)
    graph.replay()
    for one, expected in zip(out, want, strict=True):
        assert_same_bits(one, expected)
