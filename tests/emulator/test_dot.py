"""`tl.dot` in the emulator against the reference and the slow twin, in every type and order."""

from __future__ import annotations

import itertools

import pytest
import torch
import triton
import triton.language as tl

from bitassay.emulator import RefusedError, emulate
from bitassay.reference import tensor_core
from bitassay.reference.spec.arch import get_arch
from support.hard_matrices import KINDS, matrix
from support.kernel_dots import batched, dot, operands, square
from support.naive.tensor_core import FORMATS, STEPS, fma, step
from support.same_bits import assert_same_bits, from_patterns, patterns

pytestmark = pytest.mark.usefixtures("interpreting")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@pytest.mark.parametrize("block_k", [16, 64])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bit_operands_reach_the_oracle_with_their_accumulator(
    dtype: str, kind: str, block_k: int, gpu_emulation: str
) -> None:
    a, b, c = operands(kind, DTYPES[dtype])
    want = tensor_core.matmul(a, b, c, arch=gpu_emulation)
    assert_same_bits(dot(a, b, c, block_k=block_k), want)


@pytest.mark.parametrize("precision", [None, "tf32"])
@pytest.mark.parametrize("kind", KINDS)
def test_fp32_is_tf32_unless_told_otherwise(
    kind: str, precision: str | None, gpu_emulation: str
) -> None:
    a, b, c = operands(kind, torch.float32)
    want = tensor_core.matmul(a, b, c, arch=gpu_emulation, precision="tf32")
    assert_same_bits(dot(a, b, c, precision=precision), want)


@pytest.mark.parametrize("kind", KINDS)
def test_ieee_is_one_ascending_chain_of_fma(kind: str, gpu_emulation: str) -> None:
    a, b, c = operands(kind, torch.float32, m=2, n=8, k=24)
    columns = [patterns(column) for column in b.t()]
    want = []
    for row, addends in zip(a, c, strict=True):
        for column, total in zip(columns, patterns(addends), strict=True):
            for x, y in zip(patterns(row), column, strict=True):
                total = fma(x, y, total)
            want.append(total)
    got = dot(a, b, c, precision="ieee", block_k=8 if _min_k(8) else 16)
    # The tail of a block is 0 * 0, which turns an accumulator of -0 into +0.
    zero = from_patterns(want, torch.float32).view(2, 8)
    assert_same_bits(got, torch.where(zero == 0, zero + (0.0 if not _min_k(8) else -0.0), zero))


def _min_k(k: int) -> bool:
    """Triton 3.9 takes fp32 blocks of 8; before it they hold at least 16."""
    return triton.__version__.startswith("3.9")


@pytest.mark.parametrize("kind", ["normal", "wide", "special"])
@pytest.mark.parametrize("dtype", FP8)
def test_fp8_on_sm_89(dtype: str, kind: str) -> None:
    a, b, c = operands(kind, FP8[dtype], k=96)
    with emulate("sm_89"):
        got = dot(a, b, c)
    assert_same_bits(got, tensor_core.matmul(a, b, c, arch="sm_89"))


@pytest.mark.parametrize("dtype", FP8)
def test_fp8_on_sm_90_depends_on_the_tile(dtype: str) -> None:
    a, b, c = operands("wide", FP8[dtype], m=64, n=16, k=96)
    with emulate("sm_90"):
        wide = dot(a, b, c)
        narrow = torch.cat([dot(a[m : m + 16], b, c[m : m + 16]) for m in range(0, 64, 16)])
        with pytest.raises(RefusedError, match="which instruction multiplies it"):
            dot(a, b, c, num_warps=2)
    assert_same_bits(wide, tensor_core.matmul(a, b, c, arch="sm_90"))
    # Narrow tiles multiply as fp16, in two steps of 16 that take K in another order.
    half = [0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29]
    order = half + [k for k in range(32) if k not in half]
    core, rows = STEPS["sm_90"]["fp16"], [patterns(row) for row in a.half()]
    # Few outputs show which half comes first, so many are compared.
    for m, n in itertools.product(range(0, 64, 2), range(16)):
        column, total = patterns(b.half()[:, n]), patterns(c[m, n])[0]
        for block in range(0, 96, 32):
            for first in (0, 16):
                ks = [block + k for k in order[first : first + 16]]
                left, right = [rows[m][k] for k in ks], [column[k] for k in ks]
                total = step(left, right, total, FORMATS["fp16"], core)
        assert patterns(narrow[m, n]) == [total]
    assert not torch.equal(wide, narrow)


def test_batched(gpu_emulation: str) -> None:
    a, b = (matrix("normal", 32, 16, torch.bfloat16, s).view(2, 16, 16) for s in (1, 2))
    d = batched(a, b)
    for i in range(2):
        assert_same_bits(d[i], tensor_core.matmul(a[i], b[i], arch=gpu_emulation))


def test_int8_is_exact(gpu_emulation: str) -> None:
    a, b, d = square("", torch.int8, size=32)
    assert_same_bits(d, torch.matmul(a.int(), b.int()))


REFUSED = [
    ("half", torch.float16, tl.float32, "out_dtype=fp16"),
    ("precision", torch.float32, tl.float32, "input_precision=tf32x3"),
    ("widened", torch.bfloat16, tl.float32, "permutes K"),
    ("widened", torch.float16, tl.float32, "permutes K"),
    ("widened", torch.int8, tl.bfloat16, "permutes K"),
    ("widened", torch.float8_e4m3fn, tl.float16, "permutes K"),
    ("widened and transposed", torch.int8, tl.float16, "permutes K"),
    ("widened after arithmetic", torch.float8_e5m2, tl.float32, "permutes K"),
    ("added", torch.bfloat16, tl.float32, "as its accumulator"),
    ("added to zeros", torch.bfloat16, tl.float32, "as its accumulator"),
    ("added to broadcast zeros", torch.bfloat16, tl.float32, "as its accumulator"),
    ("added in a loop", torch.bfloat16, tl.float32, "as its accumulator"),
    ("added after a constexpr loop", torch.bfloat16, tl.float32, "as its accumulator"),
]


@pytest.mark.parametrize(("how", "dtype", "wide", "says"), REFUSED)
def test_refused(
    how: str, dtype: torch.dtype, wide: tl.dtype, says: str, gpu_emulation: str
) -> None:
    with pytest.raises(RefusedError, match=says):
        square(how, dtype, wide)


def test_imprecise_accumulation_is_refused() -> None:
    with emulate("sm_90"), pytest.raises(RefusedError, match="max_num_imprecise_acc=32"):
        square("imprecise", torch.float8_e5m2, size=64)


def test_what_is_defined_is_not_refused(gpu_emulation: str) -> None:
    matmul, core = tensor_core.matmul, get_arch(gpu_emulation)
    a, b, d = square("subtracted", torch.bfloat16)
    assert_same_bits(d, matmul(a, b, arch=core) - 1.0)
    a, b, d = square("second of two", torch.bfloat16)
    assert_same_bits(d, matmul(a, b, matmul(a, b, arch=core), arch=core) + 1.0)
    a, b, d = square("added after a loop", torch.bfloat16)
    assert_same_bits(d, matmul(a, b, arch=core) + 1.0)
    a, b, d = square("widened, ieee", torch.bfloat16)
    assert_same_bits(d, matmul(a.float(), b.float(), arch=core, precision="ieee"))


@pytest.mark.parametrize("size", [8])
def test_a_tile_too_small_for_the_compiler_is_an_error(size: int, gpu_emulation: str) -> None:
    with pytest.raises(triton.runtime.errors.InterpreterError, match="K >= 16"):
        square("", torch.bfloat16, size=size)
