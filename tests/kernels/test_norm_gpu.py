"""rms_norm and add_rms_norm compiled on a GPU: sums in 16 bits, packed heads, graphs."""

from __future__ import annotations

import pytest
import torch

from bitassay.kernels.norm import add_rms_norm, rms_norm
from bitassay.reference import norm as reference
from support.hard_matrices import matrix
from support.matmul_cases import mixed
from support.same_bits import assert_same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiling")]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
EPS = 1e-5


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
