"""Every tile of attention and its folds: what PTX and machine code hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from bitassay.kernels import attention_tiles as tiles
from bitassay.kernels.attention_split import _attention_fold, _attention_split
from bitassay.kernels.attention_tiles import AttentionTile
from bitassay.kernels.attention_whole import _attention_whole
from bitassay.reference.spec.polynomials import SOFTMAX_SCALE
from compile.code import ARITHMETIC, Launch, compiled, counts, disassembled, source

MORE = {
    "divide": r"\bdiv\.rn\.f32",
    "other_divide": r"\bdiv\.(?!rn\.f32|s32|u32|s64|u64)",
    "maximum": r"\bmax\.f32",
    "other_maximum": r"\bmax\.NaN|\bmax\.ftz",
}
_FLOATS = {"m_ptr", "den_ptr", "acc_ptr"}
_VALUES = {"q_ptr", "k_ptr", "v_ptr", "out_ptr"}


def compile_kernel(
    kernel: Any, dtype: str, constants: dict[str, Any], arch: str, warps: int, stages: int
) -> Launch:
    """Compile as a launch does: pointers and strides between rows are multiples of 16."""
    names = [name for name in kernel.arg_names if name.endswith("_ptr")]
    types = {n: "*fp32" if n in _FLOATS else f"*{dtype}" if n in _VALUES else "*i32" for n in names}
    strides = [n for n in kernel.arg_names if n.startswith("stride_") and n != "stride_table"]
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    code = compiled(source(kernel, types, constants, strides), arch, options)
    return code, {"kernel": kernel.__name__, "shared": code.shared}


def compile_tile(
    tile: AttentionTile,
    arch: str,
    dtype: str,
    head_dim: int,
    group: int,
    *,
    one: bool = False,
    each: int = 1,
) -> Launch:
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
    code, found = compile_kernel(kernel, dtype, constants, arch, tile.warps, tile.stages)
    return code, found | about


def compile_fold(tile: AttentionTile, arch: str, dtype: str, head_dim: int) -> Launch:
    constants = {
        "GROUP": 4, "D": head_dim, "BLOCK_M": tile.block_m, "KEY_SPLIT": 1024, "EACH": 1,
        "ROWS": tile.fold_rows, "PARTS": tile.block_m // tile.fold_rows,
    }  # fmt: skip
    about = {"tile": asdict(tile), "dtype": dtype, "head_dim": head_dim}
    code, found = compile_kernel(_attention_fold, dtype, constants, arch, 4, 3)
    return code, found | about


def launches(arch: str) -> Iterator[Launch]:
    for tile in tiles.in_use(arch):
        variants: list[dict[str, Any]] = [{"one": True}, {"one": False}]
        if tile.split:
            variants = [{"each": int(not tile.unmasked)}]
            yield compile_fold(tile, arch, "bf16", 128)
        for dtype, head_dim, group in (("bf16", 128, 4), ("bf16", 64, 7), ("fp16", 128, 8)):
            for which in variants:
                yield compile_tile(tile, arch, dtype, head_dim, group, **which)
    for tile in tiles.candidates(arch):
        if tile not in tiles.in_use(arch):
            yield compile_tile(tile, arch, "bf16", 128, 4)


def found(arch: str) -> Iterator[dict[str, Any]]:
    codes, abouts = zip(*launches(arch), strict=True)
    for code, about, machine in zip(codes, abouts, disassembled(codes, arch), strict=True):
        multiplications = len(re.findall(r"\bFMUL\b", machine))
        ptx = counts(ARITHMETIC | MORE, code.ptx)
        yield {**about, **ptx, "machine_multiplications": multiplications}
