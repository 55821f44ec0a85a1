"""Putting the emulator under Triton's interpreter, and taking it away."""

from __future__ import annotations

import ast
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from bitassay.emulator.errors import EmulationError, RefusedError
from bitassay.emulator.interpreted.arithmetic import check_subnormals
from bitassay.emulator.interpreted.builder import GpuBuilder
from bitassay.emulator.interpreted.reductions import reduce_ops, scan_ops
from bitassay.reference.spec.target import set_emulated_arch

_PATCHED = (
    "GridExecutor",
    "ReduceOps",
    "ScanOps",
    "_implicit_cvt",
    "_patch_lang",
    "_patch_lang_tensor",
)
_ORIGINAL = {name: getattr(interpreter, name) for name in _PATCHED}
_SEMANTIC_DOT = TritonSemantic.dot
_PLAIN = interpreter.InterpreterBuilder()
# Numeric options are honoured; of the others these change no bits.
_KNOWN_OPTIONS = {
    "num_warps",
    "num_stages",
    "num_ctas",
    "maxnreg",
    "enable_fp_fusion",
    "debug",
    "launch_cooperative_grid",
    "launch_pdl",
}
_current: GpuBuilder | None = None
_launching = False


class _Switch(interpreter.InterpreterBuilder):  # type: ignore[misc]
    """The builder every part of Triton holds on to; it forwards to the one in place."""

    def __getattribute__(self, name: str) -> Any:
        return getattr(_current or _PLAIN, name)


class _LoopVariables(interpreter.ASTTransformer):  # type: ignore[misc]
    """Make a loop's variable what the compiled kernel has: an int32 tensor, not Python's int."""

    def visit_For(self, node: ast.For) -> ast.For:  # noqa: N802
        self.generic_visit(node)
        called = getattr(node.iter, "func", None)
        static = getattr(called, "attr", getattr(called, "id", "")) == "static_range"
        if isinstance(node.target, ast.Name) and not static:
            name = node.target.id
            again = ast.Assign([ast.Name(name, ast.Store())], ast.Name(name, ast.Load()))
            node.body.insert(0, self.visit_Assign(again))
        return node


interpreter.FunctionRewriter.ast_transformer = _LoopVariables()

# Triton keeps references to its one builder in places that cannot all be found (3.6.0 makes a
# semantic object for every function it patches), so the object itself learns to forward.
interpreter.interpreter_builder.__class__ = _Switch


class GpuGridExecutor(interpreter.GridExecutor):  # type: ignore[misc]
    """Triton's launch of an interpreted kernel, with the launch's numeric options honoured."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Check the launch's options, then run every program of the grid."""
        assert _current is not None
        check_subnormals()
        options = {k: v for k, v in kwargs.items() if k not in self.arg_names}
        unknown = sorted(k for k, v in options.items() if k not in _KNOWN_OPTIONS and v is not None)
        if unknown:
            raise RefusedError(f"launch option {', '.join(unknown)}: not modelled; leave it out")
        for value in (*args, *kwargs.values()):
            if getattr(value, "round_f32_to_tf32", False):
                raise RefusedError("a tensor descriptor with round_f32_to_tf32: not modelled")
        fusion = options.get("enable_fp_fusion")
        if fusion is None:
            fusion = triton.knobs.language.default_fp_fusion
        if getattr(triton.knobs.language, "force_disable_fp_fusion", False):
            fusion = False
        _current.launch(fusion=bool(fusion), num_warps=options.get("num_warps") or 4)
        global _launching
        outer, _launching = _launching, False
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # tiles are small: starting threads costs more than they save
        try:
            with np.errstate(all="ignore"):
                super().__call__(*args, **kwargs)
        except interpreter.InterpreterError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, EmulationError):
                cause = cause.__cause__
            if cause is not None:
                raise cause from None  # say it plainly, not as the repr of a repr
            raise
        finally:
            _launching = outer
            torch.set_num_threads(threads)


def _patch_lang(fn: Any) -> Any:
    """Patch triton.language once a launch: Triton does it again for every nested call."""
    global _launching
    if _launching:
        return interpreter._LangPatchScope()
    _launching = True
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    return _ORIGINAL["_patch_lang"](everything)


def _implicit_cvt(argument: Any) -> Any:
    """Make an argument what the compiled kernel receives: a Python float arrives as fp32."""
    if isinstance(argument, float):
        with np.errstate(over="ignore"):
            handle = interpreter.TensorHandle(np.array([argument], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)
    return _ORIGINAL["_implicit_cvt"](argument)


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _ORIGINAL["_patch_lang_tensor"](tensor, scope)
    # Triton 3.6.0 converts a one-element array with int(), which NumPy 2.4 refuses.
    scope.set_attr(tensor, "__index__", _index)
    scope.set_attr(tensor, "T", property(_transposed))  # Triton's own goes round the builder


def _index(tensor: Any) -> int:
    if _current is not None:
        _current.runtime_bounds += 1
    return int(tensor.handle.data.item())


def _transposed(tensor: Any) -> Any:
    rank = len(tensor.shape)
    return interpreter.interpreter_semantic.permute(tensor, (*range(rank - 2), rank - 1, rank - 2))


def _dot(self: Any, lhs: Any, rhs: Any, acc: Any, *args: Any) -> Any:
    if _current is not None:
        _current.accumulates = acc is not None
    return _SEMANTIC_DOT(self, lhs, rhs, acc, *args)


def current() -> GpuBuilder | None:
    """Return the builder in place, None outside emulation."""
    return _current


def put(builder: GpuBuilder | None) -> None:
    """Put a builder under the interpreter; None gives Triton's own back."""
    global _current
    _current = builder
    set_emulated_arch(None if builder is None else builder.arch)
    replacements = dict(_ORIGINAL)
    if builder is not None:
        replacements = {
            "GridExecutor": GpuGridExecutor,
            "ReduceOps": reduce_ops(builder),
            "ScanOps": scan_ops(builder.allowed),
            "_implicit_cvt": _implicit_cvt,
            "_patch_lang": _patch_lang,
            "_patch_lang_tensor": _patch_lang_tensor,
        }
    TritonSemantic.dot = _SEMANTIC_DOT if builder is None else _dot
    for name, value in replacements.items():
        setattr(interpreter, name, value)


def new(arch: str, allowed: frozenset[str]) -> GpuBuilder:
    """Return a builder of an architecture over Triton's own."""
    return GpuBuilder(_PLAIN, arch, allowed)
