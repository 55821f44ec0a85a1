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
