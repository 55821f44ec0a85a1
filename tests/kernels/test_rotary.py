"""rotary.apply in the emulator: heads, widths, views, values, and positions outside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bitassay.kernels import rotary
from bitassay.kernels.rotary import apply
from bitassay.reference import rotary as reference
from bitassay.reference.spec.rotary_table import RotaryTable
from support.hard_matrices import KINDS, matrix
from support.matmul_cases import mixed
from support.same_bits import assert_same_bits, patterns

pytestmark = pytest.mark.usefixtures("interpreting")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(autouse=True)
def clear_flag() -> Iterator[None]:
    yield
    rotary._OUTSIDE.take()


def operands(
    tokens: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, ...]:
    """q and k as views of one packed product, positions in any order, and true tables."""
    packed = mixed(tokens, (heads + 2 * kv_heads) * width, dtype, seed)
    packed = packed.view(tokens, heads + 2 * kv_heads, width)
    table = RotaryTable(10_000.0, width, 40)
    g = torch.Generator().manual_seed(seed)
    positions = torch.randint(0, 40, (tokens,), generator=g)
    return packed[:, :heads], packed[:, heads : heads + kv_heads], positions, table.cos, table.sin


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "width"),
    [(1, 4, 2, 64), (11, 4, 2, 64), (2, 32, 8, 128), (3, 9, 1, 128), (2, 5, 3, 6), (3, 1, 1, 2)],
)
def test_any_shape(
    gpu_emulation: str, tokens: int, heads: int, kv_heads: int, width: int, dtype: str
) -> None:
    case = operands(tokens, heads, kv_heads, width, DTYPES[dtype], tokens + heads)
    for got, want in zip(apply(*case), reference.apply(*case), strict=True):
        assert_same_bits(got, want)
        assert got.is_contiguous()
    rotary.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_value(gpu_emulation: str, kind: str, dtype: str) -> None:
    _, _, positions, cos, sin = operands(6, 1, 1, 64, DTYPES[dtype], 3)
    q = matrix(kind, 6, 3 * 64, DTYPES[dtype], 1).view(6, 3, 64)
    k = matrix(kind, 6, 64, DTYPES[dtype], 2).view(6, 1, 64)
    case = (q, k, positions, cos, sin)
    for got, want in zip(apply(*case), reference.apply(*case), strict=True):
        assert_same_bits(got, want)


def test_the_sign_of_zeros(gpu_emulation: str) -> None:
    zeros = torch.tensor([0.0, -0.0]).bfloat16()
    q = torch.cartesian_prod(zeros, zeros)[:, None]  # at position 0: cos 1, sin 0
    case = (q, q, torch.zeros(4, dtype=torch.int64), torch.ones(1, 1), torch.zeros(1, 1))
    got = apply(*case)[0]
    assert_same_bits(got, reference.apply(*case)[0])
    # first * 1 - second * 0 keeps -0 only where both are: -0 + -(+0); second * 1 + first * 0.
    assert got[:, 0].signbit().tolist() == [
        [False, False],
        [False, False],
        [True, False],
        [False, True],
    ]


def test_into_one_packed_buffer_and_in_place(gpu_emulation: str) -> None:
    q, k, positions, cos, sin = operands(5, 4, 2, 64, torch.bfloat16, 4)
    want = torch.cat(reference.apply(q, k, positions, cos, sin), dim=1)
    packed = torch.zeros(5, 6, 64, dtype=torch.bfloat16)
    out = apply(q, k, positions, cos, sin, out=(packed[:, :4], packed[:, 4:]))
    assert_same_bits(packed, want)
    assert out[1].data_ptr() == packed[:, 4:].data_ptr()
    copy = torch.cat([q, k], dim=1)
    apply(copy[:, :4], copy[:, 4:], positions, cos, sin, out=(copy[:, :4], copy[:, 4:]))
    assert_same_bits(copy, want)


def test_a_batch_changes_no_row(gpu_emulation: str) -> None:
    q, k, positions, cos, sin = operands(30, 4, 2, 64, torch.bfloat16, 5)
    together = apply(q, k, positions, cos, sin)
    for row in (0, 13, 29):
        one = slice(row, row + 1)
        alone = apply(q[one], k[one], positions[one], cos, sin)
        for got, want in zip(together, alone, strict=True):
            assert_same_bits(got[one], want)


def test_positions_outside_are_told_afterwards(gpu_emulation: str) -> None:
    q, k, positions, cos, sin = operands(5, 9, 2, 64, torch.bfloat16, 6)
    want = apply(q, k, positions, cos, sin)
    rotary.check()
    wrong = positions.clone()
    wrong[3], wrong[1] = 40, -1
    got = apply(q, k, wrong, cos, sin)
    for one, expected in zip(got, want, strict=True):
        assert set(patterns(one[[1, 3]])) == {0x7FFF}
        assert_same_bits(one[[0, 2, 4]], expected[[0, 2, 4]])
    with pytest.raises(ValueError, match="row 1: position -1 is outside the rotary tables"):
        rotary.check()
    rotary.check()
    apply(q, k, torch.full((5,), 40), cos, sin)
    with pytest.raises(ValueError, match="row 0: position 40 "):
        rotary.check()


def test_nothing_to_do(gpu_emulation: str) -> None:
    q, k, positions, cos, sin = operands(2, 4, 2, 64, torch.bfloat16, 7)
    got = apply(q[:0], k[:0], positions[:0], cos, sin)
    assert [x.shape for x in got] == [(0, 4, 64), (0, 2, 64)]
    got = apply(q, k[:, :0], positions, cos, sin)
    assert got[1].shape == (2, 0, 64)
    assert_same_bits(got[0], reference.apply(q, k, positions, cos, sin)[0])


def test_what_does_not_fit_is_refused(gpu_emulation: str) -> None:
    q, k, positions, cos, sin = operands(2, 4, 2, 64, torch.bfloat16, 8)
    with pytest.raises(TypeError, match="q torch.float32, k torch.float32"):
        apply(q.float(), k.float(), positions, cos, sin)
    with pytest.raises(TypeError, match="q torch.bfloat16, k torch.float16"):
        apply(q, k.half(), positions, cos, sin)
    with pytest.raises(TypeError, match="positions int64 .* found torch.int32"):
        apply(q, k, positions.int(), cos, sin)
    with pytest.raises(TypeError, match="torch.float64"):
        apply(q, k, positions, cos.double(), sin)
    with pytest.raises(ValueError, match=r"found \[2\], \[40, 32\] and \[39, 32\]"):
        apply(q, k, positions, cos, sin[:39])
    with pytest.raises(ValueError, match=r"q and k \[2, heads, 64\], found \[2, 4, 32\]"):
        apply(q[..., :32], k[..., :32], positions, cos, sin)
    with pytest.raises(ValueError, match=r"q and k \[1, heads, 64\]"):
        apply(q, k, positions[:1], cos, sin)
    with pytest.raises(ValueError, match="q: expected adjacent columns"):
        apply(q.transpose(1, 2).contiguous().transpose(1, 2), k, positions, cos, sin)
    with pytest.raises(ValueError, match=r"out\[1\]: expected torch.bfloat16 \[2, 2, 64\]"):
        apply(q, k, positions, cos, sin, out=(q, q))
    with pytest.raises(ValueError, match="one device, found cpu, meta"):
        apply(q, k.to("meta"), positions, cos, sin)


def test_tritons_own_interpreter_is_refused() -> None:
    case = operands(1, 1, 1, 2, torch.bfloat16, 1)
    with pytest.raises(RuntimeError, match="computes as NumPy"):
        apply(*case)
