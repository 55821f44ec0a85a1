"""rotary.apply compiled on a GPU: a model's shapes, any value, any position."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bitassay.kernels import rotary
from bitassay.kernels.rotary import apply
from bitassay.reference import rotary as reference
from bitassay.reference.spec.rotary_table import RotaryTable
from support.hard_matrices import KINDS, matrix
from support.many_rows import many
from support.same_bits import assert_same_bits, patterns

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("compiling")]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
POSITIONS = 512


@pytest.fixture(autouse=True)
def clear_flag() -> Iterator[None]:
    yield
    rotary._OUTSIDE.take()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 7, 2048])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width"), [(32, 8, 128), (16, 8, 128), (4, 2, 64), (5, 1, 96)]
)
def test_shapes_of_models(
    cuda: torch.device, heads: int, kv_heads: int, width: int, tokens: int, dtype: str
) -> None:
    packed = many(tokens, (heads + 2 * kv_heads) * width, DTYPES[dtype], 1, cuda)
    packed = packed.view(tokens, heads + 2 * kv_heads, width)
    q, k = packed[:, :heads], packed[:, heads : heads + kv_heads]
    table = RotaryTable(500_000.0, width, POSITIONS)
    cos, sin = table.cos.to(cuda), table.sin.to(cuda)
    positions = torch.randint(0, POSITIONS, (tokens,), device=cuda)
    out = torch.zeros(tokens, heads + kv_heads, width, dtype=packed.dtype, device=cuda)
    apply(q, k, positions, cos, sin, out=(out[:, :heads], out[:, heads:]))
    want = reference.apply(q, k, positions, cos, sin)
    assert_same_bits(out, torch.cat(want, dim=1))
    for got, one in zip(apply(q, k, positions, cos, sin), want, strict=True):
        assert_same_bits(got, one)
    rotary.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_value(cuda: torch.device, kind: str, dtype: str) -> None:
    q = matrix(kind, 512, 4 * 128, DTYPES[dtype], 1).to(cuda).view(512, 4, 128)
    k = matrix(kind, 512, 128, DTYPES[dtype], 2).to(cuda).view(512, 1, 128)
    table = RotaryTable(10_000.0, 128, POSITIONS)
    case = (q, k, torch.arange(512, device=cuda), table.cos.to(cuda), table.sin.to(cuda))
    for got, want in zip(apply(*case), reference.apply(*case), strict=True):
        assert_same_bits(got, want)


def test_positions_outside_are_told_afterwards(cuda: torch.device) -> None:
    q = torch.ones(6, 32, 128, device=cuda).bfloat16()
    cos, sin = (torch.ones(9, 64, device=cuda) for _ in range(2))
    positions = torch.tensor([0, 8, 9, 3, -1, 2**40], device=cuda)
    got = apply(q, q[:, :8], positions, cos, sin)
    want = reference.apply(q[[0, 1, 3]], q[[0, 1, 3], :8], positions[[0, 1, 3]], cos, sin)
    for one, expected in zip(got, want, strict=True):
        assert set(patterns(one[[2, 4, 5]])) == {0x7FFF}
        assert_same_bits(one[[0, 1, 3]], expected)
    with pytest.raises(ValueError, match="row 2: position 9 "):
        rotary.check()
    rotary.check()
