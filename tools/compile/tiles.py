"""Every tile of the linear layers and the kernels of integers: what their PTX holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from bitassay.kernels import tiles
from bitassay.kernels.embedding import _embedding
from bitassay.kernels.fingerprint import _fingerprint_rows, _fold
from bitassay.kernels.linear_pointer import _linear_pointer
from bitassay.kernels.linear_tma import _linear_tma
from bitassay.kernels.tiles import GROUP, Tile
from compile.code import ARITHMETIC, compiled, counts, source

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    arch: str,
    divisible: tuple[str, ...] = (),
    warps: int = 4,
    stages: int = 3,
    assemble: bool = True,
) -> dict[str, Any]:
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    of = source(kernel, types, constants, divisible)
    code = compiled(of, arch, options, assemble=assemble)
    found = counts(ARITHMETIC, code.ptx)
    return {"kernel": kernel.__name__, "shared": code.shared, **found}


def compile_linear(
    arch: str,
    dtype: str,
    tile: Tile,
    *,
    bias: bool,
    whole: bool,
    out: str | None = None,
    assemble: bool = True,
) -> dict[str, Any]:
    constants: dict[str, Any] = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP": GROUP,
        "SWAP": tile.swap, "HAS_BIAS": bias, "PADDED": bias,
    }  # fmt: skip
    pointer = f"*{dtype}"
    divisible: tuple[str, ...] = ()
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
        kernel = _linear_tma
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
        assemble=assemble,
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


def found(arch: str) -> Iterator[dict[str, Any]]:
    for dtype in ("bf16", "fp16", "fp32"):
        in_use = tiles.in_use(arch, DTYPES[dtype])
        for tile in tiles.candidates(arch, DTYPES[dtype]) if dtype == "bf16" else in_use:
            used = tile in in_use
            yield compile_linear(arch, dtype, tile, bias=False, whole=True, assemble=used)
            if used:
                yield compile_linear(arch, dtype, tile, bias=True, whole=False)
            if used and tile.kind == "tma":  # logits in fp32
                yield compile_linear(arch, dtype, tile, bias=True, whole=True, out="fp32")
    yield from compile_integers(arch)
