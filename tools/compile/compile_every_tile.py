"""Compiles kernels for an architecture without a GPU and prints what the PTX holds, as JSON lines.

Run by test_ptx.py in a process without Triton's interpreter: `compile_every_tile.py sm_90`.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitassay.kernels import tiles
from bitassay.kernels.embedding import _embedding
from bitassay.kernels.fingerprint import _fingerprint_rows, _fold
from bitassay.kernels.linear_pointer import _linear_pointer
from bitassay.kernels.linear_tma import _linear_tma
from bitassay.kernels.tiles import GROUP, Tile
from bitassay.reference.spec.arch import get_arch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PATTERNS = {
    "mma_sync": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(?:bf16\.bf16|f16\.f16)\.f32",
    "other_mma_sync": r"mma\.sync\.(?!aligned\.m16n8k16\.row\.col\.f32)",
    "wgmma": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.(?:bf16\.bf16|f16\.f16)",
    "other_wgmma": r"wgmma\.mma_async\.sync\.aligned\.(?!m64n\d+k16\.f32)",
    "fma": r"\bfma\.rn\.f32",
    "mul": r"\bmul(?:\.rn)?\.f32",
    "add": r"\b(?:add|sub)(?:\.rn)?\.f32",
    "packed": r"\b(?:fma|mul|add)(?:\.\w+)*\.(?:f32x2|f16x2|bf16x2|f16|bf16|f64)\b",
    "ftz": r"\.ftz\b",
    "approximate": r"\.approx\b",
    "copy_16": r"cp\.async\.c[ag]\.shared\.global.*0x10",
    "descriptor": r"cp\.async\.bulk\.tensor",
    "round": r"cvt\.rn\.(?:bf16|f16)(?:x2)?\.f32",
    "float": r"\.f(?:16|32|64)\b",
}


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    arch: str,
    divisible: tuple[str, ...] = (),
    warps: int = 4,
    stages: int = 3,
) -> dict[str, Any]:
    """Compile as a launch does: pointers and the named arguments are multiples of 16."""
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in names
    }
    aligned = [n for n in names if n in divisible or signature[n].startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    major, minor = get_arch(arch).compute_capability
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", 10 * major + minor, 32),
        options={"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False},
    )
    ptx = compiled.asm["ptx"]
    counts = {name: len(re.findall(pattern, ptx)) for name, pattern in PATTERNS.items()}
    return {"kernel": kernel.__name__, "shared": compiled.metadata.shared, **counts}


def compile_linear(
    arch: str, dtype: str, tile: Tile, *, bias: bool, whole: bool, out: str | None = None
) -> dict[str, Any]:
    constants = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP": GROUP,
        "SWAP": tile.swap, "HAS_BIAS": bias, "PADDED": bias,
    }  # fmt: skip
    pointer = f"*{dtype}"
    if tile.kind == "pointer":
        types = dict.fromkeys(("x_ptr", "w_ptr", "bias_ptr", "out_ptr"), pointer)
        constants |= {"stride_xk": 1, "stride_wk": 1, "UNIT": 8, "WHOLE_K": whole,
                      "IEEE": dtype == "fp32"}  # fmt: skip
        kernel, divisible = _linear_pointer, ("stride_xb", "stride_wb")
    else:
        half = tile.block_n // (1 + tile.halves)
        k_first = not whole  # a transposed weight, in the second variant of each tile
        w_block = [tile.block_n, tile.block_k]
        types = {
            "x_desc": f"tensordesc<{dtype}[{tile.block_m}, {tile.block_k}]>",
            "w_desc": f"tensordesc<{dtype}{w_block[::-1] if k_first else w_block}>",
            "out_desc": f"tensordesc<{out or dtype}[{tile.block_m}, {half}]>",
            "bias_ptr": pointer,
        }
        constants |= {"HALVES": tile.halves, "K_FIRST": k_first}
        kernel, divisible = _linear_tma, ()
    if not bias:
        constants["bias_ptr"] = None
    found = compile_kernel(
        kernel,
        types,
        constants,
        arch,
        divisible,
        warps=tile.warps,
        stages=tile.stages - (out == "fp32"),
    )
    about = {"dtype": dtype, "tile": asdict(tile), "bias": bias, "whole": whole}
    return {**found, **about, "out": out or dtype}


def compile_integers(arch: str) -> list[dict[str, Any]]:
    """The kernels in which no float may appear."""
    embedding = {"NAN": 0x7FFF, "BLOCK_T": 4, "BLOCK_H": 1024}
    prints = {"INFINITY": 0x7F80, "WIDTH": 16, "BLOCK_R": 2, "BLOCK_D": 4096}
    ids = {"ids_ptr": "*i64", "weight_ptr": "*i16", "out_ptr": "*i16", "flag_ptr": "*i64"}
    rows = {"x_ptr": "*i16", "out_ptr": "*i64"}
    return [
        compile_kernel(_embedding, ids, embedding, arch),
        compile_kernel(_fingerprint_rows, rows, prints, arch, warps=8),
        compile_kernel(_fold, {"rows_ptr": "*i64", "out_ptr": "*i64"}, {"BLOCK_R": 1024}, arch),
    ]


def main(arch: str) -> None:
    for dtype in ("bf16", "fp16", "fp32"):
        in_use = tiles.in_use(arch, DTYPES[dtype])
        for tile in tiles.candidates(arch, DTYPES[dtype]) if dtype == "bf16" else in_use:
            print(json.dumps(compile_linear(arch, dtype, tile, bias=False, whole=True)))
            if tile in in_use:
                print(json.dumps(compile_linear(arch, dtype, tile, bias=True, whole=False)))
            if tile in in_use and tile.kind == "tma":  # logits in fp32
                logits = compile_linear(arch, dtype, tile, bias=True, whole=True, out="fp32")
                print(json.dumps(logits))
    for found in compile_integers(arch):
        print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
