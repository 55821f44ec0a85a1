"""Fixtures for every room's tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from bitassay.reference.spec.arch import EMULATED
from support.fresh_python import FreshPython

if TYPE_CHECKING:
    import torch

# One mode per process, chosen before anything imports triton: "0" is a run on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts what it runs in the background with interrupts ignored, and commands that tests
# start and interrupt would ignore them too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """After the slowest tests, say what all of them cost: workers and what they started too."""
    if config.getoption("durations") is not None:
        used = os.times()
        seconds = used.user + used.children_user
        terminalreporter.write_line(f"CPU time of this session: {seconds:.0f} s in user mode")


@pytest.fixture
def interpreting() -> None:
    """Skip unless kernels are interpreted in this run."""
    import triton

    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1; this run compiles kernels")


@pytest.fixture
def compiling() -> None:
    """Skip unless kernels are compiled in this run."""
    import triton

    if triton.knobs.runtime.interpret:
        pytest.skip("needs compiled kernels: run with TRITON_INTERPRET=0")


@pytest.fixture(
    params=[*EMULATED, pytest.param("cuda", marks=pytest.mark.gpu)], ids=lambda name: f"on {name}"
)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where a test's kernels run: on the CPU as each architecture computes, or on this GPU."""
    if request.param == "cuda":
        request.getfixturevalue("compiling")
        yield request.getfixturevalue("cuda")
        return
    import torch

    from bitassay.emulator import emulate

    request.getfixturevalue("interpreting")
    with emulate(request.param):
        yield torch.device("cpu")


@pytest.fixture(scope="session")
def cuda():
    """The CUDA device; a test that asks for it is skipped, aloud, where there is none."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def fresh_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FreshPython]:
    """What runs programs in a Python of their own."""
    with FreshPython(tmp_path_factory.mktemp("fresh-python")) as python:
        yield python


from bitassay.emulator.fixture import gpu_emulation  # noqa: E402
from support.golden_fixtures import (  # noqa: E402  (they import what settles triton's mode)
    folder,
    generated,
    make_drafted,
    make_stream,
    pairs,
    provenance,
    recorded,
    run,
)

__all__ = [
    "folder",
    "generated",
    "gpu_emulation",
    "make_drafted",
    "make_stream",
    "pairs",
    "provenance",
    "recorded",
    "run",
]
