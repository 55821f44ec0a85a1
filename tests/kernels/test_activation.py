"""silu_and_mul in the emulator: every shape and value."""

from __future__ import annotations

import pytest
import torch

from bitassay.kernels.activation import silu_and_mul
from bitassay.reference import activation as reference
from support.hard_matrices import KINDS, matrix
from support.matmul_cases import mixed
from support.same_bits import assert_same_bits

pytestmark = pytest.mark.usefixtures("interpreting")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 1), (3, 5), (22, 64), (5, 704), (33, 33), (2, 2050)]
)
def test_any_shape(gpu_emulation: str, rows: int, width: int, dtype: str) -> None:
    x = mixed(rows, 2 * width, DTYPES[dtype], rows)
    assert_same_bits(silu_and_mul(x), reference.silu_and_mul(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_value(gpu_emulation: str, kind: str, dtype: str) -> None:
    x = matrix(kind, 20, 144, DTYPES[dtype], 1)
    for scaled in (x, x * 30):
        assert_same_bits(silu_and_mul(scaled), reference.silu_and_mul(scaled))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_gate(gpu_emulation: str, dtype: str) -> None:
    gate = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(DTYPES[dtype]).view(32, -1)
    for up in (1.0, -3.0):
        x = torch.cat([gate, torch.full_like(gate, up)], dim=1)
        assert_same_bits(silu_and_mul(x), reference.silu_and_mul(x))


def test_views_and_a_place_to_write(gpu_emulation: str) -> None:
    x = mixed(6, 40, torch.bfloat16, 3)
    want = reference.silu_and_mul(x)
    wide = torch.nn.functional.pad(x, (3, 5))[:, 3:43]
    out = torch.zeros(6, 33, dtype=torch.bfloat16)
    silu_and_mul(wide, out=out[:, 5:25])
    assert_same_bits(out[:, 5:25].contiguous(), want)
    assert not out[:, :5].any()
    assert not out[:, 25:].any()


def test_nothing_to_do(gpu_emulation: str) -> None:
    x = torch.ones(3, 8).bfloat16()
    assert silu_and_mul(x[:0]).shape == (0, 4)
    assert silu_and_mul(x[:, :0]).shape == (3, 0)


def test_what_does_not_fit_is_refused(gpu_emulation: str) -> None:
    x = torch.ones(3, 8).bfloat16()
    with pytest.raises(TypeError, match="gate_up torch.float32"):
        silu_and_mul(x.float())
    with pytest.raises(ValueError, match=r"\[T, 2 \* F\] .* found \[3, 7\]"):
        silu_and_mul(x[:, :7])
    with pytest.raises(ValueError, match="found .* with strides"):
        silu_and_mul(x.t())
    with pytest.raises(ValueError, match=r"out: expected torch.bfloat16 \[3, 4\]"):
        silu_and_mul(x, out=x)
    with pytest.raises(ValueError, match="one device, found cpu, meta"):
        silu_and_mul(x, out=torch.empty(3, 4, dtype=torch.bfloat16, device="meta"))


def test_tritons_own_interpreter_is_refused() -> None:
    with pytest.raises(RuntimeError, match="computes as NumPy"):
        silu_and_mul(torch.ones(1, 2).bfloat16())
