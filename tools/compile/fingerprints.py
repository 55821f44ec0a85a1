"""The fingerprints of a layer, all at once: what their PTX holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from triton.compiler import ASTSource

from bitassay.kernels.fingerprint_into import Shape, _fingerprint_into, shape_for
from compile.code import ARITHMETIC, compiled, counts

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
    aligned: list[tuple[int, ...]] = [(names.index(name),) for name in ("out_ptr", "slots_ptr")]
    aligned += [(names.index("x_ptrs"), i) for i in range(len(widths)) if pairs]
    source = ASTSource(
        fn=_fingerprint_into,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={path: [["tt.divisibility", 16]] for path in aligned},
    )
    options = {"num_warps": shape.warps, "enable_fp_fusion": False}
    code = compiled(source, arch, options)
    about = {"dtype": dtype, "pairs": pairs, "shape": shape._asdict(), "tensors": len(widths)}
    return {**counts(ARITHMETIC | MORE, code.ptx), **about, "shared": code.shared}


def found(arch: str) -> Iterator[dict[str, Any]]:
    for dtype in INFINITY:
        for count in (1, 2048):
            shape = shape_for(count, WIDTHS[0] * (2 if dtype == "fp32" else 1) // 2)
            yield compile_launch(arch, dtype, WIDTHS, True, shape)
        odd = shape_for(300, ODD[0])
        yield compile_launch(arch, dtype, ODD, dtype == "fp32", odd)
    yield compile_launch(arch, "bf16", WIDTHS + WIDTHS[:5], True, shape_for(1, 14336))
