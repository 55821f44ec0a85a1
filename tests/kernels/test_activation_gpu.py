"""silu_and_mul compiled on a GPU: a model's shapes, every gate."""

from __future__ import annotations

import pytest
import torch

from bitassay.kernels.activation import silu_and_mul
from bitassay.reference import activation as reference
from support.hard_matrices import matrix
from support.many_rows import many
from support.same_bits import assert_same_bits

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiling")]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ROWS = 256  # of a comparison: the reference holds many float64 copies


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 2048])
@pytest.mark.parametrize("width", [1, 100, 704, 6144, 14336])
def test_shapes_of_models(cuda: torch.device, width: int, rows: int, dtype: str) -> None:
    x = many(rows, 2 * width, DTYPES[dtype], 1, cuda)
    got = silu_and_mul(x)
    for one, some in zip(got.split(ROWS), x.split(ROWS), strict=True):
        assert_same_bits(one, reference.silu_and_mul(some))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_gate(cuda: torch.device, dtype: str) -> None:
    gate = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(DTYPES[dtype]).to(cuda)
    up = matrix("patterns", 64, 1 << 16, DTYPES[dtype], 1).to(cuda)
    x = torch.cat([gate.expand(64, -1), up], dim=1)
    assert_same_bits(silu_and_mul(x), reference.silu_and_mul(x))


def test_offsets_beyond_31_bits(cuda: torch.device) -> None:
    if torch.cuda.get_device_properties(cuda).total_memory < 16 << 30:
        pytest.skip("needs 16 GiB of GPU memory")
    x = torch.zeros(80_000, 28672, dtype=torch.bfloat16, device=cuda)
    x[-1] = 2.0
    got = silu_and_mul(x)
    assert_same_bits(got[-1:], reference.silu_and_mul(x[-1:]))
    assert not got[0].any()
