"""The engine's tests interpret kernels: one mode per process, chosen before triton is imported."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # "0" is a run on a GPU: interpreted tests skip

from bitassay.kernels.emulation.fixture import gpu_emulation as _gpu_emulation

gpu_emulation = _gpu_emulation
