"""Units of arithmetic, mixed matrices and the matmul that is nothing but its definition."""

from __future__ import annotations

import torch
from torch import Tensor

from bitassay.reference.floats import bits, fma
from bitassay.reference.spec.arch import get_arch
from bitassay.reference.tensor_core import dot_add, tensor_core
from support.hard_matrices import KINDS, matrix

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "fp32": torch.float32,
}
PRECISION = {"tf32": "tf32", "fp32": "ieee"}
SIXTEEN = [(arch, kind) for arch in ("sm_89", "sm_90") for kind in ("bf16", "fp16")]
TENSOR_CORES = [(arch, kind) for arch in ("sm_89", "sm_90") for kind in DTYPES if kind != "fp32"]
# sm_80 and sm_86 have the cores of sm_89, and ieee is the same everywhere.
UNITS = [*TENSOR_CORES, ("sm_90", "fp32")]


def group_of(arch: str, kind: str) -> int:
    """Products a step."""
    return 1 if kind == "fp32" else tensor_core(get_arch(arch), DTYPES[kind]).group


def mixed(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows of all kinds side by side, so that every batch holds ordinary and awkward ones."""
    return torch.cat(
        [matrix(KINDS[i % len(KINDS)], 1, columns, dtype, seed + i) for i in range(rows)]
    )


def ordinary(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Magnitudes from 1/8 to 4: no subnormal of any format, no zero."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=g)
    return torch.copysign(x.abs().clamp(0.125, 4.0), x).to(dtype)


def by_steps(a: Tensor, b: Tensor, c: Tensor | None, arch: str, kind: str) -> Tensor:
    """[M, K], [K, N], [M, N] -> [M, N]: one call of dot_add (or fma) per step, no tiles."""
    d = torch.zeros(a.shape[0], b.shape[1], device=a.device) if c is None else c
    if kind == "fp32":
        for k in range(a.shape[1]):
            d = fma(a[:, k, None], b[k], d)
        return d + 0.0
    if kind == "tf32":
        a, b = ((bits(x) >> 13 << 13).view(torch.float32) for x in (a, b))
    core = tensor_core(get_arch(arch), a.dtype)
    for k in range(0, a.shape[1], core.group):
        left, right = a[:, None, k : k + core.group], b[k : k + core.group].t()[None]
        d = dot_add(left, right, d, core)
    return d
