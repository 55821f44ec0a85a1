"""Kernels around `tl.dot` as cases: one launch each, the same in every mode and device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from support.hard_matrices import KINDS, matrix


@triton.jit
def _dot(
    a_ptr, b_ptr, c_ptr, d_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    m, n = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    acc = tl.load(c_ptr + m * N + n)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + m * K + k[None, :], mask=k[None, :] < K, other=0.0)
        b = tl.load(b_ptr + k[:, None] * N + n, mask=k[:, None] < K, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(d_ptr + m * N + n, acc)


def dot(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    precision: str | None = None,
    block_k: int = 32,
    num_warps: int = 4,
) -> Tensor:  # [M, K], [K, N], [M, N] -> [M, N]
    """c + a @ b in one program."""
    d = torch.empty_like(c)
    _dot[(1,)](
        a, b, c, d, a.shape[1], M=c.shape[0], N=c.shape[1], BLOCK_K=block_k, PRECISION=precision,
        num_warps=num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return d


def operands(
    kind: str, dtype: torch.dtype, m: int = 16, n: int = 32, k: int = 72
) -> tuple[Tensor, Tensor, Tensor]:
    """a [m, k], b [k, n] and an accumulator c [m, n]."""
    c = matrix("special" if kind == "special" else "normal", m, n, torch.float32, 3)
    return matrix(kind, m, k, dtype, 1), matrix(kind, n, k, dtype, 2).t().contiguous(), c


@triton.jit
def _batched(a_ptr, b_ptr, d_ptr, B: tl.constexpr, S: tl.constexpr):
    z = tl.arange(0, B)[:, None, None] * S * S
    i = z + tl.arange(0, S)[None, :, None] * S + tl.arange(0, S)[None, None, :]
    tl.store(d_ptr + i, tl.dot(tl.load(a_ptr + i), tl.load(b_ptr + i)))


def batched(a: Tensor, b: Tensor) -> Tensor:  # [B, S, S], [B, S, S] -> [B, S, S]
    """A dot of three dimensions."""
    d = torch.empty(a.shape, device=a.device)
    _batched[(1,)](a, b, d, B=a.shape[0], S=a.shape[1])
    return d


@triton.jit
def _square(a_ptr, b_ptr, d_ptr, HOW: tl.constexpr, S: tl.constexpr, WIDE: tl.constexpr, K):
    i = tl.arange(0, S)[:, None] * S + tl.arange(0, S)[None, :]
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    if HOW == "half":
        d = tl.dot(a, b, out_dtype=tl.float16).to(tl.float32)
    elif HOW == "precision":
        d = tl.dot(a, b, input_precision="tf32x3")
    elif HOW == "imprecise":
        d = tl.dot(a, b, max_num_imprecise_acc=32)
    elif HOW == "widened":
        d = tl.dot(a.to(WIDE), b.to(WIDE))
    elif HOW == "widened and transposed":
        d = tl.dot(a.to(WIDE).T, b.to(WIDE))
    elif HOW == "widened after arithmetic":
        d = tl.dot(tl.trans(a.to(WIDE) + 1.0).to(tl.bfloat16), b.to(tl.bfloat16))
    elif HOW == "widened, ieee":
        d = tl.dot(a.to(WIDE), b.to(WIDE), input_precision="ieee")
    elif HOW == "added":
        d = 1.0 + tl.dot(a, b)
    elif HOW == "added to zeros":
        d = tl.dot(a, b, tl.zeros((S, S), tl.float32)) + 1.0
    elif HOW == "added to broadcast zeros":
        d = tl.dot(a, b, tl.broadcast_to(tl.zeros((1, S), tl.float32), (S, S))) + 1.0
    elif HOW == "added in a loop":
        d = tl.zeros((S, S), tl.float32)
        for _ in range(0, K, S):
            d += tl.dot(a, b)
    elif HOW == "added after a constexpr loop":
        d = tl.zeros((S, S), tl.float32)
        for _ in range(0, S, S):
            d = tl.dot(a, b, d)
        d += 1.0
    elif HOW == "added after a loop":
        d = tl.zeros((S, S), tl.float32)
        for _ in range(0, K, S):
            d = tl.dot(a, b, d)
        d += 1.0
    elif HOW == "subtracted":
        d = tl.dot(a, b) - 1.0
    elif HOW == "second of two":
        d = tl.dot(a, b, tl.dot(a, b)) + 1.0
    else:
        d = tl.dot(a, b)
    tl.store(d_ptr + i, d)


def square(
    how: str,
    dtype: torch.dtype,
    wide: tl.dtype = tl.float32,
    size: int = 16,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """a, b [size, size] and what the kernel makes of them `how`."""
    if dtype == torch.int8:
        g = torch.Generator().manual_seed(1)
        a, b = torch.randint(-128, 128, (2, size, size), generator=g, dtype=dtype)
    else:
        a, b = (matrix("normal", size, size, dtype, s) for s in (1, 2))
    out = torch.int32 if dtype == torch.int8 and how == "" else torch.float32
    a, b = a.to(device), b.to(device)
    d = torch.empty(size, size, dtype=out, device=device)
    _square[(1,)](a, b, d, HOW=how, S=size, WIDE=wide, K=size, enable_fp_fusion=False)
    return a, b, d


def _case(
    dtype: torch.dtype,
    kind: str,
    precision: str | None,
    shape: tuple[int, int],
    warps: int,
    device: str,
) -> Tensor:
    a, b, c = (t.to(device) for t in operands(kind, dtype, *shape, k=96))
    return dot(a, b, c, precision=precision, num_warps=warps)


def cases() -> dict[str, Callable[[str], Tensor]]:
    """Name -> a function of the device: what an H100 and its emulation must agree on."""
    found: dict[str, Callable[[str], Tensor]] = {}
    dtypes = [(torch.bfloat16, None), (torch.float16, None), (torch.float32, "tf32")]
    dtypes += [(torch.float8_e4m3fn, None), (torch.float8_e5m2, None), (torch.float32, "ieee")]
    for dtype, precision in dtypes:
        for kind in KINDS:
            for shape, warps in (((16, 16), 4), ((32, 32), 1), ((64, 32), 4), ((128, 64), 8)):
                name = f"dot {dtype} {precision} {kind} {shape} {warps}"
                arguments = (dtype, kind, precision, shape, warps)
                found[name] = lambda device, of=arguments: _case(*of, device)
    for how in ("subtracted", "second of two", "added after a loop", "widened, ieee"):
        found[how] = lambda device, how=how: square(how, torch.bfloat16, device=device)[2]
    found["int8"] = lambda device: square("", torch.int8, size=32, device=device)[2]
    a, b = (matrix("normal", 32, 16, torch.bfloat16, s).view(2, 16, 16) for s in (1, 2))
    found["batched"] = lambda device: batched(a.to(device), b.to(device))
    return found
