"""silu_and_mul, emulated and on a GPU: every shape and value."""

from __future__ import annotations

import pytest
import torch

from bitassay.kernels.activation import silu_and_mul
from bitassay.reference import activation as reference
from support.hard_matrices import KINDS, matrix
from support.matmul_cases import mixed
from support.same_bits import assert_same_bits

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = {"cpu": (20, 144), "cuda": (64, 4096)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "width"), [(1, 1), (3, 5), (22, 64), (5, 704), (33, 33), (2, 2050)]
)
def test_any_shape(device: torch.device, rows: int, width: int, dtype: str) -> None:
    x = mixed(rows, 2 * width, DTYPES[dtype], rows).to(device)
    assert_same_bits(silu_and_mul(x), reference.silu_and_mul(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_value(device: torch.device, kind: str, dtype: str) -> None:
    x = matrix(kind, *SIZES[device.type], DTYPES[dtype], 1).to(device)
    for scaled in (x, x * 30):
        assert_same_bits(silu_and_mul(scaled), reference.silu_and_mul(scaled))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_gate(device: torch.device, dtype: str) -> None:
    gate = torch.arange(-(1 << 15), 1 << 15, device=device).to(torch.int16)
    gate = gate.view(DTYPES[dtype]).view(32, -1)
    for up in (1.0, -3.0):
        x = torch.cat([gate, torch.full_like(gate, up)], dim=1)
        assert_same_bits(silu_and_mul(x), reference.silu_and_mul(x))


def test_views_and_a_place_to_write(device: torch.device) -> None:
    x = mixed(6, 40, torch.bfloat16, 3).to(device)
    want = reference.silu_and_mul(x)
    wide = torch.nn.functional.pad(x, (3, 5))[:, 3:43]
    out = torch.zeros(6, 33, dtype=torch.bfloat16, device=device)
    silu_and_mul(wide, out=out[:, 5:25])
    assert_same_bits(out[:, 5:25].contiguous(), want)
    assert not out[:, :5].any()
    assert not out[:, 25:].any()


def test_nothing_to_do(device: torch.device) -> None:
    x = torch.ones(3, 8, device=device).bfloat16()
    assert silu_and_mul(x[:0]).shape == (0, 4)
    assert silu_and_mul(x[:, :0]).shape == (3, 0)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x = torch.ones(3, 8, device=device).bfloat16()
    with pytest.raises(TypeError, match="gate_up torch.float32"):
        silu_and_mul(x.float())
    with pytest.raises(ValueError, match=r"\[T, 2 \* F\] .* found \[3, 7\]"):
        silu_and_mul(x[:, :7])
    with pytest.raises(ValueError, match="found .* with strides"):
        silu_and_mul(x.t())
    with pytest.raises(ValueError, match=r"out: expected torch.bfloat16 \[3, 4\]"):
        silu_and_mul(x, out=x)
    with pytest.raises(ValueError, match=f"one device, found {x.device}, meta"):
        silu_and_mul(x, out=torch.empty(3, 4, dtype=torch.bfloat16, device="meta"))


@pytest.mark.usefixtures("interpreting")
def test_tritons_own_interpreter_is_refused() -> None:
    with pytest.raises(RuntimeError, match="computes as NumPy"):
        silu_and_mul(torch.ones(1, 2).bfloat16())
