"""Compiles attention for an architecture without a GPU; prints what the code holds as JSON lines.

Run by test_attention_ptx.py, without Triton's interpreter: `compile_attention.py sm_90`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import triton
from compile_every_tile import PATTERNS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitassay.kernels import attention_tiles as tiles
from bitassay.kernels.attention_split import _attention_fold, _attention_split
from bitassay.kernels.attention_tiles import AttentionTile
from bitassay.kernels.attention_whole import _attention_whole
from bitassay.reference.spec.arch import get_arch
from bitassay.reference.spec.polynomials import SOFTMAX_SCALE

MORE = {
    "divide": r"\bdiv\.rn\.f32",
    "other_divide": r"\bdiv\.(?!rn\.f32|s32|u32|s64|u64)",
    "maximum": r"\bmax\.f32",
    "other_maximum": r"\bmax\.NaN|\bmax\.ftz",
}
_NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
_FLOATS = {"m_ptr", "den_ptr", "acc_ptr"}
_VALUES = {"q_ptr", "k_ptr", "v_ptr", "out_ptr"}


def compile_kernel(
    kernel: Any, dtype: str, constants: dict[str, Any], arch: str, warps: int, stages: int
) -> dict[str, Any]:
    """Compile as a launch does: pointers and strides between rows are multiples of 16."""
    names = kernel.arg_names
    signature = {}
    for name in names:
        pointer = "*fp32" if name in _FLOATS else f"*{dtype}" if name in _VALUES else "*i32"
        kind = pointer if name.endswith("_ptr") else "i32"
        signature[name] = "constexpr" if name in constants else kind
    strides = [n for n in names if n.startswith("stride_") and n != "stride_table"]
    aligned = [n for n in names if n in strides or signature[n].startswith("*")]
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
    counts = {name: len(re.findall(p, ptx)) for name, p in (PATTERNS | MORE).items()}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code = subprocess.run(
            [_NVDISASM, "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    return {
        "kernel": kernel.__name__,
        "shared": compiled.metadata.shared,
        "machine_multiplications": len(re.findall(r"\bFMUL\b", code)),
        **counts,
    }


def compile_tile(
    tile: AttentionTile,
    arch: str,
    dtype: str,
    head_dim: int,
    group: int,
    *,
    one: bool = False,
    each: int = 1,
) -> dict[str, Any]:
    constants = {
        "SCALE": SOFTMAX_SCALE[head_dim], "GROUP": group, "PAGE": 16, "D": head_dim,
        "BLOCK_M": tile.block_m, "BLOCK_N": 64, "BLOCKS": 16,
    }  # fmt: skip
    about = {
        "tile": asdict(tile), "dtype": dtype, "head_dim": head_dim, "group": group, "one": one,
        "each": each,
    }  # fmt: skip
    if tile.split:
        constants |= {"SLICES": tile.slices, "EACH": each, "UNMASKED": tile.unmasked}
        constants |= {"KEPT": tile.block_m if tile.unmasked else 2 * tile.fold_rows}
        kernel = _attention_split
    else:
        constants |= {"ONE": one}
        kernel = _attention_whole
    return compile_kernel(kernel, dtype, constants, arch, tile.warps, tile.stages) | about


def compile_fold(tile: AttentionTile, arch: str, dtype: str, head_dim: int) -> dict[str, Any]:
    constants = {
        "GROUP": 4, "D": head_dim, "BLOCK_M": tile.block_m, "KEY_SPLIT": 1024, "EACH": 1,
        "ROWS": tile.fold_rows, "PARTS": tile.block_m // tile.fold_rows,
    }  # fmt: skip
    about = {"tile": asdict(tile), "dtype": dtype, "head_dim": head_dim}
    return compile_kernel(_attention_fold, dtype, constants, arch, 4, 3) | about


def main(arch: str) -> None:
    found = []
    for tile in tiles.in_use(arch):
        variants: list[dict[str, Any]] = [{"one": True}, {"one": False}]
        if tile.split:
            variants = [{"each": int(not tile.unmasked)}]
            found.append(compile_fold(tile, arch, "bf16", 128))
        for dtype, head_dim, group in (("bf16", 128, 4), ("bf16", 64, 7), ("fp16", 128, 8)):
            for which in variants:
                found.append(compile_tile(tile, arch, dtype, head_dim, group, **which))
    for tile in tiles.candidates(arch):
        if tile not in tiles.in_use(arch):
            found.append(compile_tile(tile, arch, "bf16", 128, 4))
    for one in found:
        print(json.dumps(one))


if __name__ == "__main__":
    main(sys.argv[1])
