"""The row-wise kernels: what PTX and machine code hold.

The wrappers themselves say what to compile: their launches are caught, with every argument, and
compiled as a launch would specialise them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import ASTSource

from bitassay.kernels import activation, cache, norm, rotary, sample
from bitassay.kernels.device import compile_without_device
from bitassay.reference.spec.contract import default_contract
from compile.code import Launch, compiled, counts, disassembled

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int16: "*i16",
    torch.int64: "*i64",
}
PTX = {
    "fma": r"\bfma\.rn\.f32\b",
    "mul": r"\bmul\.rn\.f32\b",
    "add": r"\b(?:add|sub)\.rn\.f32\b",
    "div": r"\bdiv\.rn\.f32\b",
    "sqrt": r"\bsqrt\.rn\.f32\b",
    # Without .rn the assembler may contract what is multiplied and added.
    "free": r"\b(?:fma|mul|add|sub)\.(?!rn\.)(?:\w+\.)*(?:f32|f16|bf16|f64|f32x2|f16x2|bf16x2)\b",
    # Additions of 16-bit floats, one or two at a time; sm_89 writes those of bf16 as a * 1 + b.
    "narrow_add": r"\badd\.rn\.(?:bf16|f16)\b|\bfma\.rn\.bf16\b",
    "narrow_add_2": r"\badd\.rn\.(?:bf16x2|f16x2)\b|\bfma\.rn\.bf16x2\b",
    "narrow_other": r"\b(?:mul|sub)\.rn\.(?:bf16|f16)|\bfma\.rn\.f16|\.rn\.f64\b",
    "approximate": r"\.approx\b|\b(?:ex2|lg2|rcp|rsqrt|sin|cos|tanh)\.|\bdiv\.full",
    "ftz": r"\.ftz\b",
    "plus_zero": r"\badd\.rn\.f32\s+[^;]*\b0f[08]0000000\b",
    "float": r"\.(?:f16|bf16|f32|f64)(?:x2)?\b",
    "load_16_bytes": r"ld\.global\S*\.v4\.b32",
}
SASS = {
    "FFMA": r"\bFFMA\b",
    "FMUL": r"\bFMUL\b",
    "FADD": r"\bFADD\b",
    "MUFU": r"\bMUFU\b",
    "spilled": r"\b(?:STL|LDL)\b",
}


@triton.jit
def _only(x_ptr, DIVISIONS: tl.constexpr, ROOTS: tl.constexpr):
    """Nothing but divisions and square roots: what the assembler makes of each."""
    x = tl.load(x_ptr)
    for i in tl.static_range(DIVISIONS):
        x = tl.div_rn(x, tl.load(x_ptr + 1 + i))
    for _ in tl.static_range(ROOTS):
        x = tl.sqrt_rn(x)
    tl.store(x_ptr, x)


class Recorder:
    """Stands where a kernel stands and keeps what a wrapper launches it with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[Any] = []  # (grid, arguments, options)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append((grid, args, options))


def specialised(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> ASTSource:
    """The source as Triton's launcher would specialise it."""
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {name: options[name] for name in kernel.arg_names if name in options}
    signature, constants, attributes = {}, {}, {}
    for at, (name, value) in enumerate(values.items()):
        if name in options or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[at,] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name], address = TYPES[value.dtype], value.data_ptr()
        elif isinstance(value, int):
            signature[name], address = "i32" if abs(value) < 2**31 else "i64", value
        else:
            signature[name], address = "fp32", 1
        if address % 16 == 0:
            attributes[at,] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def caught(module: Any, name: str, call: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """A module's kernel, and the launches of it that a call of a wrapper makes."""
    kernel = getattr(module, name)
    recorder = Recorder(kernel)
    setattr(module, name, recorder)
    try:
        call()
    finally:
        setattr(module, name, kernel)
    assert recorder.launches, name
    return kernel, recorder.launches


def build(arch: str, kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    given = {k: v for k, v in options.items() if k not in kernel.arg_names}
    code = compiled(specialised(kernel, args, options), arch, given)
    return code, {"kernel": kernel.__name__, "shared": code.shared, **options}


def show(arch: str, module: Any, name: str, call: Callable[[], Any]) -> Iterator[Launch]:
    """Yield the launches of a module's kernel that a call of a wrapper makes."""
    kernel, recorded = caught(module, name, call)
    for _, args, options in recorded:
        yield build(arch, kernel, args, options)


def launches(arch: str) -> Iterator[Launch]:
    """Yield every launch of the wrappers at widths and counts that choose different ones."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    for divisions, roots in ((1, 0), (2, 0), (0, 1), (0, 2)):
        options = {"DIVISIONS": divisions, "ROOTS": roots, "enable_fp_fusion": False}
        yield build(arch, _only, (empty(8, dtype=torch.float32),), options)

    yield from show(
        arch, activation, "_silu_and_mul", lambda: activation.silu_and_mul(empty(3, 2 * 14336))
    )
    few = empty(4, 192, dtype=torch.float16)
    yield from show(arch, activation, "_silu_and_mul", lambda: activation.silu_and_mul(few))

    # Every width's launch, and for narrow rows that of many rows too.
    for width, count in (
        (1, 3), (64, 3), (64, 2048), (100, 2048), (128, 3), (128, 2048), (512, 3), (512, 2048),
        (1000, 3), (2048, 3), (4096, 3), (8192, 3), (16384, 3),
    ):  # fmt: skip
        x, weight = empty(count, width), empty(width)
        yield from show(arch, norm, "_rms_norm", partial(norm.add_rms_norm, x, x, weight, eps=1e-5))
    x, weight = empty(3, 4096), empty(4096)
    yield from show(arch, norm, "_rms_norm", lambda: norm.rms_norm(x, weight, eps=1e-5))
    heads = empty(2, 6 * 128, dtype=torch.float16).view(2, 6, 128)[:, :4]
    of_heads = empty(128, dtype=torch.float16)
    yield from show(arch, norm, "_rms_norm", lambda: norm.rms_norm(heads, of_heads, eps=1e-6))

    for dtype, q_heads, kv_heads, width in (
        (torch.bfloat16, 32, 8, 128),
        (torch.bfloat16, 4, 2, 64),
        (torch.float16, 5, 1, 96),
    ):
        packed = empty(3, q_heads + 2 * kv_heads, width, dtype=dtype)
        q, k = packed[:, :q_heads], packed[:, q_heads : q_heads + kv_heads]
        position, table = empty(3, dtype=torch.int64), empty(99, width // 2, dtype=torch.float32)
        yield from show(
            arch, rotary, "_rotary", partial(rotary.apply, q, k, position, table, table)
        )

    pages = empty(7, cache.BLOCK_SIZE, 8, 128)
    rows, slots = empty(3, 8, 128), empty(3, dtype=torch.int64)
    yield from show(arch, cache, "_write", lambda: cache.write(rows, rows, pages, pages, slots))

    for dtype, sum_width in (
        (torch.bfloat16, 4096),
        (torch.float16, 4096),
        (torch.float32, 4096),
        (torch.float32, 16),
    ):
        contract = default_contract(arch, sum_width=sum_width)
        logits = empty(2, 4100, dtype=dtype)
        yield from show(
            arch,
            sample,
            "_log_softmax",
            partial(sample.log_softmax, logits, contract=contract),
        )


def found(arch: str) -> Iterator[dict[str, Any]]:
    compile_without_device()  # nothing runs, so tensors may be the CPU's
    codes, abouts = zip(*launches(arch), strict=True)
    for code, about, machine in zip(codes, abouts, disassembled(codes, arch), strict=True):
        yield {**about, **counts(PTX, code.ptx), **counts(SASS, machine)}
