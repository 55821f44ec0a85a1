"""The addition to the residual stream, emulated and on a GPU: every shape and value."""

from __future__ import annotations

import pytest
import torch

from bitassay.kernels.norm import add
from bitassay.reference import norm as reference
from support.hard_matrices import KINDS, matrix
from support.matmul_cases import mixed
from support.same_bits import assert_same_bits

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = {"cpu": [(20, 144)], "cuda": [(20, 144), (1, 4096), (37, 1000), (300, 64)]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 5), (22, 64), (5, 704), (2, 2050)])
def test_any_shape(device: torch.device, rows: int, width: int, dtype: str) -> None:
    x, residual = (mixed(rows, width, DTYPES[dtype], rows + seed) for seed in (0, 100))
    got = add(x.to(device), residual.to(device))
    assert_same_bits(got, reference.add(x, residual))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_value(device: torch.device, kind: str, dtype: str) -> None:
    for rows, width in SIZES[device.type]:
        x, residual = (matrix(kind, rows, width, DTYPES[dtype], seed) for seed in (1, 2))
        got = add(x.to(device), residual.to(device))
        assert_same_bits(got, reference.add(x, residual))


def test_halfway_sums_go_to_the_even_neighbour(device: torch.device) -> None:
    x = torch.tensor([[1.0, 1.0078125, -1.0, -0.0, 0.0]]).bfloat16()
    residual = torch.tensor([[2.0**-8, 2.0**-8, 1.0, -0.0, -0.0]]).bfloat16()
    want = torch.tensor([[1.0, 1.015625, 0.0, -0.0, 0.0]]).bfloat16()
    assert_same_bits(add(x.to(device), residual.to(device)), want)


def test_views_and_places_to_write(device: torch.device) -> None:
    x, residual = (mixed(6, 40, torch.bfloat16, seed).to(device) for seed in (3, 4))
    want = reference.add(x, residual)
    wide = torch.nn.functional.pad(x, (3, 5))[:, 3:43]
    out = torch.zeros(6, 53, dtype=torch.bfloat16, device=device)
    assert add(wide, residual, out=out[:, 5:45]).data_ptr() == out[:, 5:45].data_ptr()
    assert_same_bits(out[:, 5:45].contiguous(), want)
    assert not out[:, :5].any()
    assert not out[:, 45:].any()
    for place in (x, residual):
        one, other = x.clone(), residual.clone()
        add(one, other, out=one if place is x else other)
        assert_same_bits(one if place is x else other, want)


def test_nothing_to_do(device: torch.device) -> None:
    x = torch.ones(3, 8, device=device).bfloat16()
    assert add(x[:0], x[:0]).shape == (0, 8)
    assert add(x[:, :0], x[:, :0]).shape == (3, 0)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x = torch.ones(3, 8, device=device).bfloat16()
    with pytest.raises(TypeError, match="residual torch.float16"):
        add(x, x.half())
    with pytest.raises(TypeError, match="x torch.float32"):
        add(x.float(), x.float())
    with pytest.raises(ValueError, match=r"residual: expected torch.bfloat16 \[3, 8\]"):
        add(x, x[:2])
    with pytest.raises(ValueError, match=r"x: expected \[T, D\] with adjacent columns"):
        add(x.t(), x.t())
    with pytest.raises(ValueError, match=r"out: expected torch.bfloat16 \[3, 8\]"):
        add(x, x, out=torch.empty(3, 8, device=device))
