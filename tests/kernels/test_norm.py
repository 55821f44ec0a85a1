"""rms_norm and add_rms_norm, emulated and on a GPU: every launch, shape and value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitassay.kernels.norm import Shape, add_rms_norm, rms_norm, shape_for
from bitassay.reference import norm as reference
from support.hard_matrices import KINDS, matrix
from support.many_rows import many
from support.matmul_cases import mixed
from support.same_bits import assert_same_bits

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
EPS = 1e-5
WIDTHS = {"cpu": [72], "cuda": [128, 2048, 4096]}


def operands(
    rows: int, width: int, dtype: torch.dtype, seed: int, device: torch.device
) -> tuple[Tensor, ...]:
    x, residual = (mixed(rows, width, dtype, s).to(device) for s in (seed, seed + 100))
    return x, residual, matrix("special", 1, width, dtype, seed)[0].to(device)


def check(x: Tensor, residual: Tensor, weight: Tensor, eps: float, **options: object) -> None:
    got = rms_norm(x, weight, eps=eps, **options)  # type: ignore[arg-type]
    assert_same_bits(got, reference.rms_norm(x, weight, eps=eps))
    got = add_rms_norm(x, residual, weight, eps=eps, **options)  # type: ignore[arg-type]
    for one, want in zip(got, reference.add_rms_norm(x, residual, weight, eps=eps), strict=True):
        assert_same_bits(one, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 22])
@pytest.mark.parametrize("width", [1, 2, 3, 64, 100, 704, 1030])
def test_any_shape(device: torch.device, width: int, rows: int, dtype: str) -> None:
    check(*operands(rows, width, DTYPES[dtype], width + rows, device), eps=EPS)


@pytest.mark.gpu
@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 7, 64, 2048])
@pytest.mark.parametrize("width", [1, 64, 100, 128, 256, 1000, 2048, 2560, 4096, 14336, 16384])
def test_shapes_of_models(cuda: torch.device, width: int, rows: int, dtype: str) -> None:
    x, residual = (many(rows, width, DTYPES[dtype], seed, cuda) for seed in (1, 100))
    check(x, residual, matrix("normal", 1, width, DTYPES[dtype], 3)[0].to(cuda), EPS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_any_value(device: torch.device, kind: str, dtype: str) -> None:
    rows = 9 if device.type == "cpu" else 64
    for width in WIDTHS[device.type]:
        x, residual = (matrix(kind, rows, width, DTYPES[dtype], s).to(device) for s in (1, 2))
        weight = matrix(kind, 1, width, DTYPES[dtype], 3)[0].to(device)
        for eps in (0.0, 1e-6, 1.0):
            check(x, residual, weight, eps)


def test_zeros_keep_their_sign_and_huge_rows_vanish(device: torch.device) -> None:
    ones = torch.ones(4, device=device).bfloat16()
    x = torch.tensor([[-0.0, 0.0, 1.0, -1.0], [3e38, -3e38, 1.0, 0.0]]).bfloat16().to(device)
    got = rms_norm(x, ones, eps=EPS)
    assert got.signbit().tolist() == [[True, False, False, True], [False, True, False, False]]
    assert_same_bits(got[1].abs(), torch.zeros(4).bfloat16())  # the sum of squares is infinite


@pytest.mark.parametrize("dtype", DTYPES)
def test_roots_and_divisions_of_many_rows(device: torch.device, dtype: str) -> None:
    x, residual = (matrix("scaled", 1000, 8, DTYPES[dtype], seed).to(device) for seed in (1, 2))
    weight = torch.ones(8, dtype=DTYPES[dtype], device=device)
    check(x, residual, weight, EPS, shape=Shape(256, 4))


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_no_launch_changes_a_bit(device: torch.device, rows: int) -> None:
    check(*operands(13, 100, torch.bfloat16, 5, device), eps=EPS, shape=Shape(rows, 8))


@pytest.mark.gpu
@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("warps", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(("width", "rows"), [(64, 1), (64, 16), (128, 8), (1000, 2), (4096, 1)])
def test_no_compiled_launch_changes_a_bit(
    cuda: torch.device, width: int, rows: int, warps: int
) -> None:
    x, residual = (mixed(37, width, torch.bfloat16, seed).to(cuda) for seed in (1, 100))
    weight = matrix("normal", 1, width, torch.bfloat16, 3)[0].to(cuda)
    check(x, residual, weight, EPS, shape=Shape(rows, warps))


def test_a_batch_changes_no_row(device: torch.device) -> None:
    x, residual, weight = operands(40, 64, torch.bfloat16, 6, device)
    together = add_rms_norm(x, residual, weight, eps=EPS)[0]
    for row in (0, 17, 39):
        one = slice(row, row + 1)
        alone = add_rms_norm(x[one], residual[one], weight, eps=EPS)[0]
        assert_same_bits(together[one], alone)


def test_heads_of_a_packed_product(device: torch.device) -> None:
    packed = mixed(5, 8 * 64, torch.bfloat16, 7).to(device).view(5, 8, 64)
    weight = matrix("normal", 1, 64, torch.bfloat16, 8)[0].to(device)
    out = torch.zeros(5, 6, 64, dtype=torch.bfloat16, device=device)
    q = rms_norm(packed[:, :4], weight, eps=EPS, out=out[:, :4])
    k = rms_norm(packed[:, 4:6], weight, eps=EPS, out=out[:, 4:])
    assert q.data_ptr() == out.data_ptr()
    assert_same_bits(out, reference.rms_norm(packed[:, :6], weight, eps=EPS))
    assert_same_bits(k.contiguous(), out[:, 4:].contiguous())


def test_views_and_places_to_write(device: torch.device) -> None:
    x, residual, weight = operands(6, 40, torch.bfloat16, 9, device)
    want = reference.add_rms_norm(x, residual, weight, eps=EPS)
    wide = torch.nn.functional.pad(x, (3, 5))[:, 3:43]
    spread = torch.stack([weight, weight], 1)[:, 0]
    for one, expected in zip(add_rms_norm(wide, residual, spread, eps=EPS), want, strict=True):
        assert_same_bits(one, expected)
    x, residual = x.clone(), residual.clone()
    add_rms_norm(x, residual, weight, eps=EPS, out=x, residual_out=residual)  # in place
    assert_same_bits(x, want[0])
    assert_same_bits(residual, want[1])
    assert_same_bits(x[:, :1].contiguous(), want[0][:, :1].contiguous())


def test_nothing_to_do(device: torch.device) -> None:
    x, weight = (torch.ones(shape, device=device).bfloat16() for shape in ((3, 8), (8,)))
    assert rms_norm(x[:0], weight, eps=EPS).shape == (0, 8)
    assert [t.shape for t in add_rms_norm(x[:0], x[:0], weight, eps=EPS)] == [(0, 8), (0, 8)]
    assert rms_norm(x.view(3, 1, 8)[:, :0], weight, eps=EPS).shape == (3, 0, 8)


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    x, weight = (torch.ones(shape, device=device).bfloat16() for shape in ((3, 8), (8,)))
    with pytest.raises(TypeError, match="x torch.float32, weight torch.float32"):
        rms_norm(x.float(), weight.float(), eps=EPS)
    with pytest.raises(TypeError, match="x torch.bfloat16, weight torch.float16"):
        rms_norm(x, weight.half(), eps=EPS)
    with pytest.raises(TypeError, match="residual torch.float16"):
        add_rms_norm(x, x.half(), weight, eps=EPS)
    with pytest.raises(ValueError, match=r"weight \[D\], found \[3, 8\] with .* and \[7\]"):
        rms_norm(x, weight[:7], eps=EPS)
    with pytest.raises(ValueError, match=r"strides \[1, 3\]"):
        rms_norm(torch.ones(8, 3, device=device).bfloat16().t(), weight, eps=EPS)
    with pytest.raises(ValueError, match=r"x \[T, D\]"):
        rms_norm(x[0], weight, eps=EPS)
    with pytest.raises(ValueError, match=r"residual: expected torch.bfloat16 \[3, 8\]"):
        add_rms_norm(x, x[:2], weight, eps=EPS)
    with pytest.raises(ValueError, match=r"out: expected .* found torch.float32 \[3, 8\]"):
        rms_norm(x, weight, eps=EPS, out=x.float())
    with pytest.raises(ValueError, match=r"residual_out: expected"):
        add_rms_norm(x, x, weight, eps=EPS, residual_out=x[:2])
    with pytest.raises(ValueError, match="rows of 1 … 16384 elements, found 0"):
        rms_norm(x[:, :0], weight[:0], eps=EPS)
    wide = torch.ones(1, 16385, device=device).bfloat16()
    with pytest.raises(ValueError, match="found 16385"):
        rms_norm(wide, wide[0], eps=EPS)
    with pytest.raises(ValueError, match=f"one device, found {x.device}, meta"):
        rms_norm(x, weight.to("meta"), eps=EPS)


@pytest.mark.usefixtures("interpreting")
def test_tritons_own_interpreter_is_refused() -> None:
    x = torch.ones(1, 16).bfloat16()
    with pytest.raises(RuntimeError, match="computes as NumPy: import bitassay.emulator with"):
        rms_norm(x, x[0], eps=EPS)


def test_launches_hold_every_row() -> None:
    for width in (1, 64, 128, 256, 1000, 4096, 16384):
        for count in (1, 2047, 2048, 1 << 18):
            shape = shape_for(count, width)
            assert shape.rows >= 1
            assert shape.warps in (4, 8, 16)
            assert shape.rows * width <= 32 * 32 * shape.warps
