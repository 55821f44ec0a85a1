"""Compiles the fingerprints of a layer without a GPU; prints what the code holds as JSON lines.

Run by test_fingerprint_ptx.py, without Triton's interpreter: `compile_fingerprint_into.py sm_90`.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import triton
from compile_every_tile import PATTERNS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bitassay.kernels.fingerprint_into import Shape, _fingerprint_into, shape_for
from bitassay.reference.spec.arch import get_arch

# Operations of a layer of Llama-3.1-8B, and of one whose rows lie anywhere.
WIDTHS = (28672, 14336, 6144, 5120, 4096, 4096, 4096, 4096, 4096, 4096, 4096)
ODD = (4097, 300, 33)
INFINITY = {"bf16": 0x7F80, "fp16": 0x7C00, "fp32": 0x7F800000}
MORE = {
    "wide_load": r"ld\.global\.(?:\w+\.)*v4\.[bu]32",
    "load": r"\bld\.global",
    "store": r"\bst\.global",
    "atomic": r"\b(?:atom|red)\.",
    "spill": r"\b(?:ld|st)\.local",
    "multiply": r"\bmul\.lo\.[su]64",
}


def compile_launch(
    arch: str, dtype: str, widths: tuple[int, ...], pairs: bool, shape: Shape
) -> dict[str, Any]:
    """Compile as a launch does: pointers are multiples of 16, and no other number is special."""
    names = _fingerprint_into.arg_names
    bits = 32 if dtype == "fp32" else 16
    constants = {
        "WIDTHS": widths, "STRIDES": widths, "EXCESS": (0,) * (len(widths) - 1) + (-1,),
        "INFINITY": INFINITY[dtype], "WIDTH": bits, "PAIRS": pairs,
        "BLOCK_R": shape.rows, "WORDS": shape.words,
    }  # fmt: skip
    signature: dict[str, Any] = dict.fromkeys(names, "i32") | dict.fromkeys(constants, "constexpr")
    signature["x_ptrs"] = (f"*{dtype}",) * len(widths)
    signature["marks"] = ("i32",) * len(widths)
    signature["out_ptr"] = signature["slots_ptr"] = "*i64"
    aligned = [(names.index(name),) for name in ("out_ptr", "slots_ptr")]
    aligned += [(names.index("x_ptrs"), i) for i in range(len(widths)) if pairs]
    source = ASTSource(
        fn=_fingerprint_into,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={path: [["tt.divisibility", 16]] for path in aligned},
    )
    major, minor = get_arch(arch).compute_capability
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", 10 * major + minor, 32),
        options={"num_warps": shape.warps, "enable_fp_fusion": False},
    )
    ptx = compiled.asm["ptx"]
    counts = {name: len(re.findall(p, ptx)) for name, p in (PATTERNS | MORE).items()}
    about = {"dtype": dtype, "pairs": pairs, "shape": shape._asdict(), "tensors": len(widths)}
    return {**counts, **about, "shared": compiled.metadata.shared}


def main(arch: str) -> None:
    for dtype in INFINITY:
        for count in (1, 2048):
            shape = shape_for(count, WIDTHS[0] * (2 if dtype == "fp32" else 1) // 2)
            print(json.dumps(compile_launch(arch, dtype, WIDTHS, True, shape)))
        odd = shape_for(300, ODD[0])
        print(json.dumps(compile_launch(arch, dtype, ODD, dtype == "fp32", odd)))
    print(json.dumps(compile_launch(arch, "bf16", WIDTHS + WIDTHS[:5], True, shape_for(1, 14336))))


if __name__ == "__main__":
    main(sys.argv[1])
