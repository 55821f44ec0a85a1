"""Elementwise operations of Triton as cases: one launch each, the same in every mode and device.

Run as a script (`python kernel_operations.py OUT.pt [cuda]`) it writes every case's result, so that
an emulated process and a compiled one can be compared bit for bit.
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from support import kernel_dots
from support.hard_matrices import _INT, matrix, specials

BLOCK = 2048
SCALE = 0.1
FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INTEGERS = {
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "u8": torch.uint8,
    "u16": torch.uint16,
    "u32": torch.uint32,
    "u64": torch.uint64,
}
DTYPES = FLOATS | INTEGERS


@dataclass(frozen=True)
class Operation:
    """`name` applied to values of one dtype, giving another."""

    name: str
    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.name}-{self.source}-{self.target}"


def _of(names: str, sources: tuple[str, ...], target: str | None = None) -> list[Operation]:
    return [Operation(name, s, target or s) for s in sources for name in names.split()]


_F, _FP32 = tuple(FLOATS), ("fp32",)
ARITHMETIC = _of("add sub mul fma", _F) + _of("div_rn sqrt_rn floor ceil", _FP32)
CHOICES = _of("neg abs where", _F) + _of("max min max_nan min_nan clamp clamp_nan", _FP32)
COMPARISONS = _of("lt le gt ge eq ne", _F, "i8")
CONVERSIONS = [Operation("convert", s, t) for s in _F for t in _F if s != t] + [
    Operation("convert", s, t) for s in INTEGERS for t in _F
]
TO_INTEGER = [Operation("truncate", s, t) for s in _F for t in ("i16", "i32", "i64", "u32")]
INTEGER = _of("add sub mul and or xor not shift_left shift_right max min", tuple(INTEGERS)) + _of(
    "mulhi divide remainder", ("i32", "i64", "u32", "u64")
)
SCALED = _of("scale", _F, "fp32")
OPERATIONS = SCALED + ARITHMETIC + CHOICES + COMPARISONS + CONVERSIONS + TO_INTEGER + INTEGER


@triton.jit
def _floats(x, y, z, OP: tl.constexpr):
    if OP == "add":
        return x + y
    elif OP == "sub":
        return x - y
    elif OP == "mul":
        return x * y
    elif OP == "fma":
        return tl.fma(x, y, z)
    elif OP == "div_rn":
        return tl.div_rn(x, y)
    elif OP == "sqrt_rn":
        return tl.sqrt_rn(x)
    elif OP == "floor":
        return tl.floor(x)
    elif OP == "ceil":
        return tl.ceil(x)
    elif OP == "neg":
        return -x
    elif OP == "abs":
        return tl.abs(x)
    elif OP == "where":
        return tl.where(x < y, z, x)
    elif OP == "max":
        return tl.maximum(x, y)
    elif OP == "min":
        return tl.minimum(x, y)
    elif OP == "max_nan":
        return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "min_nan":
        return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "clamp":
        return tl.clamp(x, -2.0, 3.0)
    elif OP == "clamp_nan":
        return tl.clamp(x, -2.0, 3.0, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "lt":
        return x < y
    elif OP == "le":
        return x <= y
    elif OP == "gt":
        return x > y
    elif OP == "ge":
        return x >= y
    elif OP == "eq":
        return x == y
    elif OP == "ne":
        return x != y
    else:
        return x


@triton.jit
def _integers(x, y, OP: tl.constexpr):
    if OP == "add":
        return x + y
    elif OP == "sub":
        return x - y
    elif OP == "mul":
        return x * y
    elif OP == "and":
        return x & y
    elif OP == "or":
        return x | y
    elif OP == "xor":
        return x ^ y
    elif OP == "not":
        return ~x
    elif OP == "shift_left":
        return x << (y & 7)
    elif OP == "shift_right":
        return x >> (y & 7)
    elif OP == "max":
        return tl.maximum(x, y)
    elif OP == "min":
        return tl.minimum(x, y)
    elif OP == "mulhi":
        return tl.umulhi(x, y)
    elif OP == "divide":
        return x // tl.where(y == 0, 1, y).to(x.dtype)
    elif OP == "remainder":
        return x % tl.where(y == 0, 1, y).to(x.dtype)
    else:
        return x


@triton.jit
def _elementwise(
    x_ptr, y_ptr, z_ptr, out_ptr, scale,
    OP: tl.constexpr, FLOAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    x, y, z = tl.load(x_ptr + i), tl.load(y_ptr + i), tl.load(z_ptr + i)
    if OP == "scale":  # an argument, not a literal: fp32 whatever x is
        out = x * scale
    elif FLOAT:
        out = _floats(x, y, z, OP)
    else:
        out = _integers(x, y, OP)
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty))


def inputs(operation: Operation) -> tuple[Tensor, Tensor, Tensor]:
    """Three operands of BLOCK values: every pair of special values, then patterns and numbers."""
    dtype = DTYPES[operation.source]
    if operation.source in INTEGERS:
        return tuple(_integer_values(dtype, seed) for seed in (1, 2, 3))
    if operation.name == "truncate":
        return tuple(_truncatable(operation, seed) for seed in (1, 2, 3))
    odd = specials(dtype).to(_INT[dtype.itemsize])
    pairs = torch.cartesian_prod(odd, odd)
    rest = BLOCK - len(pairs)
    columns = []
    for j in range(3):
        kinds = ("patterns", "normal", "wide", "subnormal", "ties", "small")
        filler = torch.cat([matrix(k, 1, rest, dtype, 10 * j + n)[0] for n, k in enumerate(kinds)])
        g = torch.Generator().manual_seed(j)
        filler = filler[torch.randperm(len(filler), generator=g)[:rest]]
        first = pairs[:, j] if j < 2 else pairs[:, 0].roll(7)
        columns.append(torch.cat([first.view(dtype), filler]))
    return tuple(columns)


def _integer_values(dtype: torch.dtype, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    raw = torch.randint(-(2**63), 2**63 - 1, (BLOCK,), generator=g)
    raw = raw >> torch.randint(0, 64, (BLOCK,), generator=g)  # every magnitude
    ends = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 2**24 + 1, 2**53 + 1])
    raw[: len(ends)] = ends.roll(seed)
    size = dtype.itemsize
    return raw.view(_SIGNED[size]).view(-1, 8 // size)[:, 0].contiguous().view(dtype)


_SIGNED = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _truncatable(operation: Operation, seed: int) -> Tensor:
    """Floats whose integer part the target holds: the others have no defined result."""
    limits = torch.iinfo(DTYPES[operation.target])
    g = torch.Generator().manual_seed(seed)
    top = min(limits.bits - (limits.min < 0), 15 if operation.source == "fp16" else 127)
    scale = 2.0 ** torch.randint(-3, top, (BLOCK,), generator=g).double()
    x = torch.rand(BLOCK, generator=g).double() * scale
    if limits.min < 0:
        x = torch.where(torch.rand(BLOCK, generator=g) < 0.5, -x, x)
    x = (x * 0.99).to(FLOATS[operation.source])
    x[:4] = torch.tensor([0.0, -0.0, 0.5, 1.5]).to(x.dtype)
    return x


def run(operation: Operation, device: str = "cpu") -> Tensor:
    """The result of one launch, on the CPU."""
    x, y, z = (t.to(device) for t in inputs(operation))
    out = torch.empty(BLOCK, dtype=DTYPES[operation.target], device=device)
    _elementwise[(1,)](
        x, y, z, out, SCALE,
        OP=operation.name, FLOAT=operation.source in FLOATS, BLOCK=BLOCK, enable_fp_fusion=False,
    )  # fmt: skip
    return out.cpu()


if __name__ == "__main__":
    if "BITASSAY_ARCH" in os.environ:
        importlib.import_module("bitassay.emulator")
    where = "cuda" if "cuda" in sys.argv else "cpu"
    results = {str(op): run(op, where) for op in OPERATIONS}
    results |= {name: case(where).cpu() for name, case in kernel_dots.cases().items()}
    torch.save(results, sys.argv[1])
