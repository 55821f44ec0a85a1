"""Kernel tests interpret: one mode per process, chosen before anything imports triton."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch

    from bitassay.reference.spec.contract import Contract
    from support.compiled_kernels import Found

os.environ.setdefault("TRITON_INTERPRET", "1")  # "0" is a run on a GPU: interpreted tests skip

if "triton" in sys.modules:
    import triton

    compiles = isinstance(triton.language.cdiv, triton.runtime.jit.JITFunction)
    if triton.knobs.runtime.interpret == compiles:
        raise pytest.UsageError(
            "triton was imported before tests/kernels chose its mode: set TRITON_INTERPRET=1 for "
            "the whole run, or run tests/kernels in a process of its own"
        )


@pytest.fixture
def contract(cuda: torch.device) -> Contract:
    """The default contract of this GPU's architecture."""
    import torch

    from bitassay.reference.spec.arch import ARCHES
    from bitassay.reference.spec.contract import default_contract

    capability = torch.cuda.get_device_capability(cuda)
    for arch in ARCHES.values():
        if arch.compute_capability == capability:
            return default_contract(arch)
    pytest.skip(f"no contract for compute capability {capability}")


@pytest.fixture(scope="module", params=["sm_89", "sm_90"])
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[Found]]:
    """An architecture, and every launch that the test module's COMPILED compiles for it.

    One process without the interpreter compiles what all selected test modules name.
    """
    from support.compiled_kernels import compiled_once

    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    modules = {getattr(item.module, "COMPILED", "") for item in items} - {""}
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each has a folder in the session's
        folder = folder.parent
    found = compiled_once(request.param, modules, folder)
    return request.param, found[request.module.COMPILED]
