"""A kernel this project has no hand in: the matmul that Triton's tutorials teach, emulated.

Grouped program order, pointer arithmetic, wrapped rows and a masked tail of K, an activation and a
conversion, written as a user of Triton would write it who has never heard of bitassay.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from bitassay.reference import floats, tensor_core
from support.hard_matrices import matrix
from support.same_bits import assert_same_bits

pytestmark = pytest.mark.usefixtures("interpreting")


@triton.jit
def leaky_relu(x):
    return tl.where(x >= 0, x, 0.01 * x)


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, c_ptr,
    M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(axis=0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    # Programs that share columns of B run next to one another, for the sake of the L2 cache.
    group = pid // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    group_m = min(tiles_m - first_m, GROUP_M)
    pid_m = first_m + (pid % (GROUP_M * tiles_n)) % group_m
    pid_n = (pid % (GROUP_M * tiles_n)) // group_m

    tl.assume(pid_m >= 0)
    tl.assume(stride_am > 0)

    rows = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)) % M
    columns = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)) % N
    depth = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + (rows[:, None] * stride_am + depth[None, :] * stride_ak)
    b_ptrs = b_ptr + (depth[:, None] * stride_bk + columns[None, :] * stride_bn)

    accumulator = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(tl.cdiv(K, BLOCK_K)):
        a = tl.load(a_ptrs, mask=depth[None, :] < K - k * BLOCK_K, other=0.0)
        b = tl.load(b_ptrs, mask=depth[:, None] < K - k * BLOCK_K, other=0.0)
        accumulator = tl.dot(a, b, accumulator)
        a_ptrs += BLOCK_K * stride_ak
        b_ptrs += BLOCK_K * stride_bk
    if ACTIVATION == "leaky_relu":
        accumulator = leaky_relu(accumulator)
    c = accumulator.to(c_ptr.dtype.element_ty)

    out_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    out_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    c_ptrs = c_ptr + stride_cm * out_m[:, None] + stride_cn * out_n[None, :]
    tl.store(c_ptrs, c, mask=(out_m[:, None] < M) & (out_n[None, :] < N))


def matmul(a: Tensor, b: Tensor, activation: str, out: torch.dtype) -> Tensor:
    (m, k), n = a.shape, b.shape[1]
    c = torch.empty(m, n, dtype=out)
    blocks = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2}
    grid = (triton.cdiv(m, 32) * triton.cdiv(n, 32),)
    matmul_kernel[grid](
        a, b, c, m, n, k, *a.stride(), *b.stride(), *c.stride(), **blocks,
        ACTIVATION=activation, num_warps=4, num_stages=3,
    )  # fmt: skip
    return c


def expected(a: Tensor, b: Tensor, activation: str, out: torch.dtype, arch: str) -> Tensor:
    c = tensor_core.matmul(a, b, arch=arch)
    if activation == "leaky_relu":
        c = floats.canonical_nan(torch.where(c >= 0, c, torch.tensor(0.01) * c))
    return floats.round_to(c, out)


@pytest.mark.parametrize("activation", ["", "leaky_relu"])
@pytest.mark.parametrize("out", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("kind", ["normal", "wide", "special"])
def test_equals_the_reference_in_every_bit(
    kind: str, dtype: torch.dtype, out: torch.dtype, activation: str, gpu_emulation: str
) -> None:
    # Ragged in every dimension, with strides of their own; three tiles by two, and a K of three.
    a, b = matrix(kind, 70, 75, dtype, 1), matrix(kind, 43, 75, dtype, 2).t()
    want = expected(a, b, activation, out, gpu_emulation)
    assert_same_bits(matmul(a, b, activation, out), want)


def test_the_architectures_differ_and_neither_is_torch() -> None:
    from bitassay.emulator import emulate

    a, b = matrix("normal", 64, 256, torch.float16, 1), matrix("normal", 256, 64, torch.float16, 2)
    outputs = []
    for arch in ("sm_89", "sm_90"):
        with emulate(arch):
            outputs.append(matmul(a, b, "", torch.float32))
    assert not torch.equal(*outputs)
    assert all(not torch.equal(c, a.float() @ b.float()) for c in outputs)
