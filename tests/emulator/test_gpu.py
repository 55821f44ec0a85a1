"""The emulator against the machine: every case compiled for the GPU and emulated, bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.paths import SUPPORT
from support.same_bits import assert_same_bits


def results(out: Path, *arguments: str, **environment: str) -> dict[str, torch.Tensor]:
    """Every case's result, from a process with its own mode."""
    subprocess.run(
        [sys.executable, str(SUPPORT / "kernel_operations.py"), str(out), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        check=True,
    )
    return torch.load(out)


@pytest.mark.gpu
def test_an_h100_and_its_emulation_agree_in_every_bit(cuda: torch.device, tmp_path: Path) -> None:
    if torch.cuda.get_device_capability(cuda) != (9, 0):
        pytest.skip("needs compute capability 9.0")
    compiled = results(tmp_path / "compiled.pt", "cuda", TRITON_INTERPRET="0")
    emulated = results(tmp_path / "emulated.pt", TRITON_INTERPRET="1", BITASSAY_ARCH="sm_90")
    assert list(compiled) == list(emulated)
    for name, want in compiled.items():
        try:
            assert_same_bits(emulated[name], want)
        except AssertionError as error:
            raise AssertionError(f"{name}: emulated is got, the GPU is want: {error}") from None
