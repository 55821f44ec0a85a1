"""Compiled kernels on this machine's GPU against the committed goldens."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [(), ("--batch-size", "7"), ("--shuffle", "1"), ("--batch-size", "1")], ids=" ".join
)
def test_compiled_kernels_give_the_goldens_bits(cuda, options):
    """In a process of its own: this one may interpret kernels."""
    command = [sys.executable, "-m", "bitassay.golden", "check", "--all", "--with", "gpu", *options]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "equal (kernels on the GPU" in answer.stdout
