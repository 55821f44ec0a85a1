"""The addition to the residual stream, compiled on a GPU, against the reference on the CPU."""

from __future__ import annotations

import pytest
import torch

from bitassay.kernels.device import is_interpreted
from bitassay.kernels.norm import _add, add
from bitassay.reference import norm as reference
from support.hard_matrices import KINDS, matrix
from support.same_bits import assert_same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(is_interpreted(_add), reason="needs compiled kernels: TRITON_INTERPRET=0"),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (37, 1000), (300, 64)])
def test_every_value(
    cuda: torch.device, kind: str, rows: int, width: int, dtype: torch.dtype
) -> None:
    x, residual = (matrix(kind, rows, width, dtype, seed) for seed in (1, 2))
    assert_same_bits(add(x.to(cuda), residual.to(cuda)), reference.add(x, residual))
