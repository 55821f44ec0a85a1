"""The operations of Triton's interpreter with the arithmetic of a GPU: an allow-list.

A kernel reaches arithmetic only through the builder's `create_*` methods. Here each is either
written with the GPU's rounding, or known to be exact and left to Triton, or refused; a method this
file does not name is refused too, so what a newer Triton adds fails closed.

Handles carry notes in `attr`: "narrow" (bits of the narrowest value a dot operand was made from),
"zero" (a constant zero, and how many runtime loop bounds had been read when it was made), "dot" (a
dot whose accumulator the compiler knows to be zero, into which it folds a following add),
"broadcast" and "outer" (a broadcast; a product of two, whose sum may become a dot) and "race" (what
an atomic returned).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import min_dot_size
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from bitassay.emulator.errors import RefusedError
from bitassay.emulator.interpreted.arithmetic import Array
from bitassay.emulator.interpreted.dot import DotOperations
from bitassay.emulator.interpreted.floating import FloatingPoint
from bitassay.emulator.interpreted.memory import Memory
from bitassay.emulator.interpreted.refused import REFUSED
from bitassay.reference.spec.arch import emulation_of, get_arch

# Exact whatever the order or the device: left to Triton's interpreter. Integers, memory, shapes.
_EXACT = frozenset(
    f"create_{name}"
    for name in """
    add sub mul sdiv udiv srem urem and or xor shl lshr minsi minui maxsi maxui iabs
    get_program_id get_num_programs make_range
    load store masked_store int_cast int_to_ptr ptr_to_int addptr
    trans expand_dims broadcast join split unsplat gather
    select tensor_pointer_load tensor_pointer_store make_block_ptr advance
    make_tensor_descriptor descriptor_load descriptor_store descriptor_gather descriptor_scatter
    print assert assume barrier
    """.split()
)
_INTEGER_COMPARISONS = frozenset(
    f"create_icmp{name}" for name in "SLE SLT SGE SGT ULE ULT UGE UGT EQ NE".split()
)
_FLOAT_COMPARISONS: dict[str, Callable[..., Array]] = {
    "OLT": np.less,
    "OLE": np.less_equal,
    "OGT": np.greater,
    "OGE": np.greater_equal,
    "OEQ": np.equal,
    "UNE": np.not_equal,
}
# Operations behind which the compiler does not look for the width a dot operand was loaded at.
_FORGETS_WIDTH = {"create_dot", "create_descriptor_load"}
_VIEWS = {f"create_{name}" for name in ("broadcast", "expand_dims", "reshape", "trans")}
_KEEPS_ZERO = _VIEWS | {f"create_{name}" for name in ("fp_ext", "fp_trunc", "fp_to_fp")}


class GpuBuilder(FloatingPoint, Memory, DotOperations):
    """A builder for TritonSemantic that computes as `arch` does."""

    def __init__(self, plain: InterpreterBuilder, arch: str, allowed: frozenset[str]) -> None:
        self.plain, self.arch, self.allowed = plain, arch, allowed
        self.facts = emulation_of(arch)
        self.num_warps = 4
        self.fusion = False  # whether the launch lets the compiler contract a * b + c
        self.accumulates = False  # whether the tl.dot under way was given an accumulator
        self.runtime_bounds = 0  # loop bounds read from arguments, as against constexprs
        self.multiplied = self.added = False
        capability = get_arch(arch).compute_capability
        target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
        self.codegen_fns = {**plain.codegen_fns, "min_dot_size": min_dot_size(target)}
        self.options = replace(
            plain.options,
            arch=arch.replace("_", ""),
            supported_fp8_dtypes=("fp8e5", "fp8e4nv"),
            # What the CUDA backend sets; wgmma alone accumulates fp8 imprecisely.
            max_num_imprecise_acc_default=2**30 if self.facts.fp8_by_wgmma else 0,
            sanitize_overflow=False,  # only asserts, and only in debug builds
        )

    def launch(self, *, fusion: bool, num_warps: int) -> None:
        """Begin a launch with its numeric options."""
        self.fusion, self.num_warps = fusion, num_warps
        self.multiplied = self.added = False

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("create_"):
            return getattr(self.plain, name)
        method = partial(self._run, name)
        self.__dict__[name] = method
        return method

    def _run(self, name: str, *args: Any, **kwargs: Any) -> Any:
        handles = [x for x in args if isinstance(x, TensorHandle)]
        for handle in handles:
            if handle.attr.get("race"):
                raise RefusedError(
                    "the value an atomic returned was used: it depends on which program came "
                    "first; compute it from tl.program_id"
                )
            if handle.get_element_ty() == tl.float64 and "float64" not in self.allowed:
                raise RefusedError(
                    "tl.float64: not modelled; use tl.float32, or BITASSAY_ALLOW=float64"
                )
        result = self._operation(name)(*args, **kwargs)
        if name not in _FORGETS_WIDTH:
            for made in result if isinstance(result, tuple) else (result,):
                self._note_width(name, handles, made)
        for mark in ("dot", "outer"):
            if name in _VIEWS and handles[0].attr.get(mark):
                result.attr[mark] = True
        if name == "create_broadcast":
            result.attr["broadcast"] = True
        if name in _KEEPS_ZERO and "zero" in handles[0].attr:
            result.attr["zero"] = handles[0].attr["zero"]
        return result

    def _note_width(self, name: str, handles: list[TensorHandle], result: Any) -> None:
        """Note the narrowest type among the values a result was computed from."""
        if not isinstance(result, TensorHandle):
            return
        widths = [h.attr["narrow"] for h in handles if "narrow" in h.attr]
        # The compiler follows loads back to pointers and masks, and any narrow value on the way
        # (an int8 index, a boolean in memory) counts; a boolean in registers does not.
        scalars = (h.dtype.scalar for h in handles if h.data.size > 1)
        widths += [s.primitive_bitwidth for s in scalars if not s.is_ptr() and s != tl.int1]
        if widths:
            result.attr["narrow"] = min(widths)

    def _operation(self, name: str) -> Callable[..., Any]:
        own = getattr(type(self), f"_{name}", None)
        if own is not None:
            return partial(own, self)
        if name in _EXACT:
            return getattr(self.plain, name)  # type: ignore[no-any-return]
        if name in _INTEGER_COMPARISONS:
            return partial(self._compare, getattr(self.plain, name))
        if name.startswith("create_fcmp") and name[11:] in _FLOAT_COMPARISONS:
            return partial(self._float_compare, _FLOAT_COMPARISONS[name[11:]])
        allow, why, instead = REFUSED.get(
            name, (name.removeprefix("create_"), "it is not known to be exact", "another operation")
        )
        if allow in self.allowed and hasattr(self.plain, name):
            return getattr(self.plain, name)  # type: ignore[no-any-return]
        raise RefusedError(
            f"tl.{allow}: {why}, so its bits are not defined; use {instead}, or allow it by name: "
            f"BITASSAY_ALLOW={allow}"
        )

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        """Begin a program of the grid."""
        self.runtime_bounds = 0
        self.plain.set_grid_idx(x, y, z)
