"""Kernel tests interpret: one mode per process, chosen before anything imports triton."""

from __future__ import annotations

import os
import sys

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # "0" is a run on a GPU: interpreted tests skip

if "triton" in sys.modules:
    import triton

    compiles = isinstance(triton.language.cdiv, triton.runtime.jit.JITFunction)
    if triton.knobs.runtime.interpret == compiles:
        raise pytest.UsageError(
            "triton was imported before tests/kernels chose its mode: set TRITON_INTERPRET=1 for "
            "the whole run, or run tests/kernels in a process of its own"
        )

from bitassay.kernels.emulation.fixture import gpu_emulation as _gpu_emulation


@pytest.fixture
def interpreting() -> None:
    """Skip unless kernels are interpreted in this run."""
    import triton

    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1; this run compiles kernels")


gpu_emulation = _gpu_emulation
